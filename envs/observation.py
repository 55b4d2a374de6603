"""What an agent sees of a filter group: its filters' weights and twelve statistics per filter.

Shapes: N filters, D weights per filter, F statistics per filter, B images, R channels of a module that belong to one
filter, S samples of a filter's activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import UserError
from .data.objective import TOP1, Objective
from .networks.batch_size import gradient_batch
from .networks.hooks import removed_after
from .networks.modes import evaluating
from .networks.module_kinds import is_transposed
from .surgery.filter_group import Cut, FilterGroup
from .surgery.folding import by_input, reading_weight
from .surgery.masking import batch_dim, channel_dim

STATISTIC_NAMES: tuple[str, ...] = (
    "l1",
    "l2",
    "weight_mean",
    "weight_std",
    "bn_scale",
    "bn_shift",
    "mean_activation",
    "apoz",
    "taylor",
    "consumer_l1",
    "consumer_l2",
    "redundancy",
)


BATCH = 128  # images per pass, of small images


@dataclass(frozen=True)
class Observation:
    """Weights (N, D) and statistics (N, F), both float32; columns of the latter are `STATISTIC_NAMES`."""

    weights: np.ndarray
    statistics: np.ndarray

    def as_dict(self) -> dict[str, np.ndarray]:
        """The Gymnasium form."""
        return {"weights": self.weights, "statistics": self.statistics}


def observe(
    model: nn.Module,
    group: FilterGroup,
    images: Tensor,
    labels: Tensor,
    batch: int | None = None,
    objective: Objective = TOP1,
) -> Observation:
    """Read one filter group of `model` (evaluation mode, left as it was found).

    Args:
        model: the network; its state and mode are not changed.
        group: the filter group.
        images: (B, C, H, W) float images that may be looked at freely (the fit split).
        labels: (B,) int64, or other targets (B, ...).
        batch: images per pass, which does not change the result beyond rounding; None: 128, fewer of large images.
        objective: whose loss the Taylor statistic is about.

    `l1` and `l2` are means over a filter's weights (mean absolute value, root mean square), so that they do not grow
    with D. Raises UserError for a network whose activations or gradients are not finite.
    """
    return observe_all(model, [group], images, labels, batch, objective)[0]


def observe_all(
    model: nn.Module,
    groups: Sequence[FilterGroup],
    images: Tensor,
    labels: Tensor,
    batch: int | None = None,
    objective: Objective = TOP1,
) -> list[Observation]:
    """`observe` for many groups by the same passes over the images, bit for bit what each one gives alone."""
    read = _activation_columns(model, groups, images, labels, batch or gradient_batch(images, BATCH), objective)
    return [_observation(model, group, columns) for group, columns in zip(groups, read, strict=True)]


def _observation(model: nn.Module, group: FilterGroup, read: dict[str, Tensor]) -> Observation:
    weights = filter_weights(model, group)
    columns = {
        "l1": weights.abs().mean(1),
        "l2": weights.square().mean(1).sqrt(),
        "weight_mean": weights.mean(1),
        "weight_std": weights.std(1, correction=0),
        **_batch_norm_columns(model, group),
        **read,
        **_consumer_columns(model, group),
    }
    statistics = torch.stack([columns[name].float().cpu() for name in STATISTIC_NAMES], dim=1)
    for name, column in zip(STATISTIC_NAMES, statistics.T, strict=True):
        if not bool(column.isfinite().all()):
            raise UserError(
                f"The statistic {name!r} of {group.name!r} is not finite; check the checkpoint and the "
                "normalisation of the images for NaN and infinite values."
            )
    return Observation(weights.cpu().numpy(), statistics.numpy())


def filter_weights(model: nn.Module, group: FilterGroup) -> Tensor:
    """The root convolution's filters as a matrix (N, D), float32; D counts all R channels of a filter."""
    root = group.producers[0]
    weight = _by_output(model.get_submodule(root.module))
    return weight[_rows(root, weight).reshape(-1)].reshape(group.n_filters, -1)


def _by_output(module: nn.Module) -> Tensor:
    """Weight with the output channel first; a transposed convolution stores (in, out / groups, ...)."""
    weight = _weight(module)
    if not is_transposed(module):
        return weight
    assert isinstance(module, _ConvNd)
    return weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight.detach().float()


def _rows(cut: Cut, like: Tensor) -> Tensor:
    return torch.as_tensor(cut.channels, device=like.device)


def _batch_norm_columns(model: nn.Module, group: FilterGroup) -> dict[str, Tensor]:
    """Absolute scale and shift of the group's first batch normalisation; 1 and 0 without one."""
    for cut in group.cuts:
        module = model.get_submodule(cut.module)
        if isinstance(module, _BatchNorm) and module.affine:
            rows = _rows(cut, module.weight)
            scale, shift = module.weight.detach()[rows], module.bias.detach()[rows]
            return {"bn_scale": scale.abs().mean(1), "bn_shift": shift.mean(1)}
    return {"bn_scale": torch.ones(group.n_filters), "bn_shift": torch.zeros(group.n_filters)}


def _consumer_columns(model: nn.Module, group: FilterGroup) -> dict[str, Tensor]:
    """Mean absolute and root mean square of all weights with which the consumers read each filter."""
    read = []
    for cut in group.consumers:
        module = model.get_submodule(cut.module)
        weight = by_input(module, reading_weight(module).detach().float())
        read.append(weight[_rows(cut, weight)].reshape(group.n_filters, -1))
    weights = torch.cat(read, dim=1)
    return {"consumer_l1": weights.abs().mean(1), "consumer_l2": weights.square().mean(1).sqrt()}


def _activation_columns(
    model: nn.Module, groups: Sequence[FilterGroup], images: Tensor, labels: Tensor, batch: int, objective: Objective
) -> list[dict[str, Tensor]]:
    """What the consumers read of each filter of each group: mean activation, APoZ, Taylor and redundancy.

    Samples are the values of a filter that consumers read, over images, positions, channels of the filter, consumers
    and their calls. APoZ is the share of them that is not positive (Hu et al. 2016, arXiv 1607.03250, eq. 1); Taylor
    is the mean over images of |mean over samples of activation x its gradient| (Molchanov et al. 2017, eq. 8).
    """
    sums = [_Sums(group.n_filters) for group in groups]
    for start in range(0, len(images), batch):
        rows, before = slice(start, start + batch), [each.n_samples for each in sums]
        slopes = _slopes(model, groups, images[rows], labels[rows], sums, objective)
        for own, slope, earlier in zip(sums, slopes, before, strict=True):
            per_image = (own.n_samples - earlier) / len(slope)
            own.taylor += (slope / max(per_image, 1)).abs().sum(0)
    return [
        {
            "mean_activation": own.activation / max(own.n_samples, 1),
            "apoz": 1 - own.positive / max(own.n_samples, 1),
            "taylor": own.taylor / len(images),
            "redundancy": _redundancy(own.gram),
        }
        for own in sums
    ]


class _Sums:
    """Sums over samples, in float64 so that their order hardly matters, (N,) and (N, N); and over images, `taylor`."""

    def __init__(self, n_filters: int) -> None:
        self.activation, self.positive, self.taylor = torch.zeros(3, n_filters, dtype=torch.float64)
        self.gram = torch.zeros(n_filters, n_filters, dtype=torch.float64)
        self.n_samples = 0

    def add(self, samples: Tensor) -> None:
        """Add what one call of a consumer reads: (N, S)."""
        samples = samples.cpu().double()
        self.activation += samples.sum(1)
        self.positive += (samples > 0).sum(1)
        self.gram += samples @ samples.T
        self.n_samples += samples.shape[1]


def _slopes(
    model: nn.Module,
    groups: Sequence[FilterGroup],
    images: Tensor,
    labels: Tensor,
    sums: Sequence[_Sums],
    objective: Objective,
) -> list[Tensor]:
    """Each image's loss slope along a gate on each filter of each group, (B, N) float64 a group.

    What the consumers read goes into `sums`. The gate multiplies a filter wherever it is read: its slope at 1 is the
    sum of activation x gradient over all samples, whatever the number of consumers and calls. No parameter gets a
    gradient.
    """
    gates = [torch.ones(len(images), group.n_filters, device=images.device, requires_grad=True) for group in groups]
    hooks = (
        model.get_submodule(cut.module).register_forward_pre_hook(_gated(cut, gate, own))
        for group, gate, own in zip(groups, gates, sums, strict=True)
        for cut in group.consumers
    )
    with removed_after(hooks), evaluating(model), _frozen(model), torch.enable_grad():
        # Summed, not averaged: then an image's slope does not depend on the others in its batch.
        loss = objective.summed_loss(model(images), labels)
        slopes = torch.autograd.grad(loss, gates, materialize_grads=True)
    return [slope.cpu().double() for slope in slopes]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of parameters nothing in front of the gate has to be remembered."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _gated(cut: Cut, gate: Tensor, sums: _Sums) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dims = batch_dim(module, inputs[0]), channel_dim(module, inputs[0])
        value = inputs[0].movedim(dims, (0, 1))
        rows = _rows(cut, value)
        sums.add(value.detach()[:, rows].transpose(0, 1).flatten(1))
        # Images may have been cut into several rows each (patches, frames).
        per_image = gate.to(value.dtype).repeat_interleave(len(value) // len(gate), dim=0)
        scale = torch.ones(value.shape[:2], device=value.device, dtype=value.dtype)
        scale[:, rows] = per_image[:, :, None]
        gated: Any = _Open.apply(value, scale.reshape(*scale.shape, *[1] * (value.dim() - 2)))
        return (gated.movedim((0, 1), dims), *inputs[1:])

    return hook


class _Open(torch.autograd.Function):
    """`value * gate` for a gate of ones, which need not be multiplied by: one map is kept, which its reader keeps too.

    A copy, since the network may overwrite in place what autograd still needs.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: Tensor) -> Tensor:
        """The same values."""
        out = value.clone()
        ctx.save_for_backward(out)
        ctx.gate_shape = gate.shape
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Of the value as it comes, of the gate summed over what it was spread over."""
        (value,) = ctx.saved_tensors
        return gradient, (gradient * value).sum_to_size(ctx.gate_shape)


def _redundancy(gram: Tensor) -> Tensor:
    """Share of each filter's energy that the other filters explain linearly: 1 - 1 / (G_ii (G^-1)_ii), in [0, 1].

    1 means that the others can stand in for it entirely. Ridge: 1e-6 of the mean energy.
    """
    energy = gram.diagonal()
    ridge = 1e-6 * energy.mean().clamp_min(1e-12)
    inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return (1 - 1 / ((energy + ridge) * inverse.diagonal())).clamp(0, 1)
