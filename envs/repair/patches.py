"""Patches: what a layer reads and writes at a few sampled places, as rows of a regression.

Shapes: B images, S samples (images x places), C channels, O outputs, K weights per filter (C x kernel size).
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from ..data.metrics import as_float64

ENOUGH = 8  # samples per weight, from which on a regression is left to its ridge
RIDGES = (1.0, 10.0, 100.0, 1e4)  # multiples; the last one all but keeps the weights as cut
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
