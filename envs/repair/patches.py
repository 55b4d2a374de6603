"""Patches: what a layer reads and writes at a few sampled places, as rows of a regression.

Shapes: B images, S samples (images x places), C channels, O outputs, K weights per filter (C x kernel size).
"""

from __future__ import annotations

import math
from itertools import pairwise, product

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from ..data.metrics import as_float64

ENOUGH = 8  # samples per weight, from which on a regression is left to its ridge
RIDGES = (1.0, 10.0, 100.0, 1e4)  # multiples; the last one all but keeps the weights as cut
WIDE = 96  # inputs per block of a Gram matrix on a CPU
Places = tuple[Tensor, ...]
"""Image number and position along every spatial axis, each broadcastable to (B, places per image)."""


def places(sizes: tuple[int, ...], count: int) -> Places:
    """The same places in every call for one output size (B, *spatial): all of them, or `count` drawn for each image."""
    n_images, spatial = sizes[0], sizes[1:]
    total = 1
    for size in spatial:
        total *= size
    flat = torch.arange(total).expand(n_images, -1)
    if count < total:
        flat = torch.randint(total, (n_images, count), generator=torch.Generator().manual_seed(total))
    found: list[Tensor] = []
    for size in reversed(spatial):
        found.append(flat % size)
        flat = flat // size
    return (torch.arange(n_images)[:, None], *reversed(found))


def outputs_at(value: Tensor, count: int, *, last: bool = False) -> Tensor:
    """Rows (S, C) of an activation (B, C, *spatial), or with `last`, as linear layers make it, (B, *spatial, C)."""
    if value.dim() == 2:
        return value
    value = value.movedim(-1, 1) if last else value
    where = places((value.shape[0], *value.shape[2:]), count)
    return value.movedim(1, -1)[where].reshape(-1, value.shape[1])


def patches_at(conv: _ConvNd, images: Tensor, count: int) -> Tensor:
    """What a convolution multiplies its weights with at those places of its output: (S, K), K ordered as its weight."""
    pads = list(conv._reversed_padding_repeated_twice)
    padded = F.pad(images, pads) if any(pads) else images
    kernel, stride, dilation = (tuple(each) for each in (conv.kernel_size, conv.stride, conv.dilation))
    sizes = [
        (size - step * (width - 1) - 1) // jump + 1
        for size, width, jump, step in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    image, *at = places((len(images), *sizes), count)
    moved = padded.movedim(1, -1)
    taps = [
        moved[(image, *(p * s + o * d for p, s, o, d in zip(at, stride, offset, dilation, strict=True)))]
        for offset in product(*map(range, kernel))
    ]
    return torch.stack(taps, -1).reshape(-1, images.shape[1] * len(taps))


def inputs_at(module: nn.Module, value: Tensor, count: int) -> Tensor:
    """The regressors (S, K) of a convolution or of a linear layer."""
    return patches_at(module, value, count) if isinstance(module, _ConvNd) else outputs_at(value, count, last=True)


class SampledPlaces:
    """`inputs_at` and `outputs_at` for some of the images at a time; where to read is worked out once.

    Args:
        n_images: B, of all images together.
    """

    def __init__(self, n_images: int) -> None:
        self.n_images = n_images
        self._known: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def inputs(self, module: nn.Module, value: Tensor, images: slice, count: int) -> Tensor:
        """The regressors (S, K) of a convolution or a linear layer whose input at these images is `value`."""
        if not isinstance(module, _ConvNd):
            return self.outputs(value, images, count, last=True)
        pads = module._reversed_padding_repeated_twice
        how = tuple(tuple(each) for each in (pads, module.kernel_size, module.stride, module.dilation))
        key = ("in", how, tuple(value.shape[2:]), images.start, images.stop, count, value.device)
        if key not in self._known:
            found = self._taps(tuple(value.shape[2:]), how, images, count)
            self._known[key] = tuple(each.to(value.device) for each in found)
        taken, outside = self._known[key]
        rows = value.movedim(1, -1).reshape(-1, value.shape[1]).index_select(0, taken)
        if len(outside):
            rows.index_fill_(0, outside, 0.0)
        return rows.view(-1, math.prod(module.kernel_size), value.shape[1]).transpose(1, 2).flatten(1)

    def outputs(self, value: Tensor, images: slice, count: int, *, last: bool = False) -> Tensor:
        """Rows (S, C) of what a layer puts out at these images."""
        if value.dim() == 2:
            return value
        value = value if last else value.movedim(1, -1)
        key = ("out", tuple(value.shape[1:-1]), images.start, images.stop, count, value.device)
        if key not in self._known:
            at = self._at(tuple(value.shape[1:-1]), images, count)
            self._known[key] = (_flat(at, tuple(value.shape[1:-1])).flatten().to(value.device),)
        return value.reshape(-1, value.shape[-1]).index_select(0, self._known[key][0])

    def _at(self, spatial: tuple[int, ...], images: slice, count: int) -> Places:
        """`places` of these images, which are numbered from 0."""
        _, *at = places((self.n_images, *spatial), count)
        return torch.arange(images.stop - images.start)[:, None], *(each[images] for each in at)

    def _taps(
        self, spatial: tuple[int, ...], how: tuple[tuple[int, ...], ...], images: slice, count: int
    ) -> tuple[Tensor, Tensor]:
        """Rows of a flattened map that each tap of a kernel multiplies, and which of these lie in the padding."""
        pads, kernel, stride, dilation = how
        before, after = pads[::2][::-1], pads[1::2][::-1]
        sides = zip(spatial, before, after, kernel, stride, dilation, strict=True)
        sizes = tuple((size + a + b - step * (width - 1) - 1) // jump + 1 for size, a, b, width, jump, step in sides)
        image, *at = self._at(sizes, images, count)
        taps = torch.tensor(list(product(*map(range, kernel))))
        found = [
            p[..., None] * jump + taps[:, side] * step - pad
            for side, (p, jump, step, pad) in enumerate(zip(at, stride, dilation, before, strict=True))
        ]
        inside = torch.ones_like(found[0], dtype=torch.bool)
        for position, size in zip(found, spatial, strict=True):
            inside &= (position >= 0) & (position < size)
        taken = _flat((image[..., None], *(each.clamp_min(0) for each in found)), spatial)
        taken = torch.where(inside, taken, torch.zeros_like(taken)).flatten()
        return taken, (~inside).flatten().nonzero().flatten()


def _flat(at: Places, spatial: tuple[int, ...]) -> Tensor:
    """Image number and position as a row number of (B, *spatial, C) seen as (rows, C)."""
    found = at[0]
    for position, size in zip(at[1:], spatial, strict=True):
        found = found * size + position
    return found


class Samples:
    """The samples of a regression, put together from some images at a time.

    The same bits as `regress` on all of them: blocks of a Gram matrix are those of the whole one. (Samples added up in
    parts, or inputs in another order, are not.)

    Args:
        n_samples: S.
        layer: the convolution or linear layer.
        intercept: whether there is one.
    """

    def __init__(self, n_samples: int, layer: nn.Module, intercept: bool) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.n_weights, self.intercept = weight[0].numel(), intercept
        self.inputs = weight.new_empty(n_samples, self.n_weights + intercept)
        self.inputs[:, self.n_weights :] = 1.0
        self.wanted = weight.new_empty(n_samples, len(weight))

    def put(self, rows: slice, inputs_SK: Tensor, wanted_SO: Tensor) -> None:
        """The samples of some images."""
        self.inputs[rows, : self.n_weights] = inputs_SK
        self.wanted[rows] = wanted_SO

    def solved(self, prior_KO: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """`regress`, with `chosen_ridge`, and torch's note whether that failed: 0 if not (a GPU is not waited for)."""
        if len(self.inputs) < ENOUGH * self.n_weights:
            inputs = self.inputs[:, : self.n_weights].contiguous()
            ridge = chosen_ridge(inputs, self.wanted, prior_KO, ridge, self.intercept)
        prior = as_float64(prior_KO)
        prior = torch.cat([prior, prior.new_zeros(1, prior.shape[1])]) if self.intercept else prior
        gram = as_float64(self._gram())
        cross = as_float64(self.inputs.T @ self.wanted)
        strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
        rest = cross - gram @ prior
        gram.diagonal().add_(strength)
        if gram.is_cuda:
            factor, failed = torch.linalg.cholesky_ex(gram)
            return prior + torch.cholesky_solve(rest, factor), failed
        found, failed = torch.linalg.solve_ex(gram, rest)
        return prior + found, failed

    def _gram(self) -> Tensor:
        """X^T X; on a CPU the blocks above the diagonal are copied from below it."""
        size = self.inputs.shape[1]
        count = max(1, min(4, size // WIDE)) if self.inputs.device.type == "cpu" else 1
        if count == 1:
            return self.inputs.T @ self.inputs
        found = self.inputs.new_zeros(size, size)
        edges = [size * index // count for index in range(count + 1)]
        for start, end in pairwise(edges):
            found[start:end, :end] = self.inputs[:, start:end].T @ self.inputs[:, :end]
        return found.tril() + found.tril(-1).T


def obstacle(module: nn.Module, max_inputs: int) -> str:
    """Why a layer's weights are not regressed, or "" if they can be."""
    if isinstance(module, nn.Linear):
        return "" if module.in_features <= max_inputs else f"more than {max_inputs} inputs per output"
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "neither a convolution nor linear"
    if module.groups > 1:
        return "a grouped convolution"
    if module.padding_mode != "zeros":
        return f"padding mode {module.padding_mode}"
    return "" if module.weight[0].numel() <= max_inputs else f"more than {max_inputs} inputs per output"


def regress(inputs_SK: Tensor, wanted_SO: Tensor, prior_KO: Tensor, ridge: float, intercept: bool) -> Tensor:
    """Ridge regression towards `prior_KO`: weights (K, O) float64, with the intercept as one more row if wanted.

    Minimises |X W - Y|^2 + ridge x (mean energy of an input) x |W - prior|^2; the intercept's prior is 0.
    """
    inputs_SK, prior_KO = _with_intercept(inputs_SK, prior_KO) if intercept else (inputs_SK, as_float64(prior_KO))
    return _solved(as_float64(inputs_SK.T @ inputs_SK), as_float64(inputs_SK.T @ wanted_SO), prior_KO, ridge)


def chosen_ridge(inputs_SK: Tensor, wanted_SO: Tensor, prior_KO: Tensor, ridge: float, intercept: bool) -> float:
    """`ridge`, or where samples are few the one of its multiples that foresees the samples of other images best.

    With about as many samples as weights a regression fits its samples exactly and everything else badly (the peak of
    "double descent", Belkin et al. 2019, arXiv 1812.11118): a linear layer of 1,024 inputs, solved on 1,000 images, can
    be far worse than as cut. So the last fifth of the samples, which are of images of their own, says how far to stay
    with the weights as cut.
    """
    n_samples, n_weights = inputs_SK.shape
    n_fit = n_samples * 4 // 5
    if n_samples >= ENOUGH * n_weights or n_fit == 0:
        return ridge
    inputs_SK, prior_KO = _with_intercept(inputs_SK, prior_KO) if intercept else (inputs_SK, as_float64(prior_KO))
    fit, held = inputs_SK[:n_fit], inputs_SK[n_fit:]
    gram, cross = as_float64(fit.T @ fit), as_float64(fit.T @ wanted_SO[:n_fit])
    solved = [_solved(gram, cross, prior_KO, ridge * multiple) for multiple in RIDGES]
    errors = [float((held @ each.to(held) - wanted_SO[n_fit:]).square().mean()) for each in solved]
    return ridge * RIDGES[errors.index(min(errors))]


def _with_intercept(inputs_SK: Tensor, prior_KO: Tensor) -> tuple[Tensor, Tensor]:
    """A column of ones, and 0 as its prior."""
    inputs_SK = torch.cat([inputs_SK, inputs_SK.new_ones(len(inputs_SK), 1)], 1)
    return inputs_SK, as_float64(torch.cat([prior_KO, prior_KO.new_zeros(1, prior_KO.shape[1])]))


def _solved(gram: Tensor, cross: Tensor, prior_KO: Tensor, ridge: float) -> Tensor:
    strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
    system = gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return prior_KO + torch.linalg.solve(system, cross - gram @ prior_KO)
