"""What an agent sees of a filter group: its filters' weights and twelve statistics a filter.

Shapes: N filters, D weights a filter, F statistics a filter, B images, R channels a filter has at its consumer,
P positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from .groups import Cut, FilterGroup

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


@dataclass(frozen=True)
class Observation:
    """Weights (N, D) and statistics (N, F), both float32; columns of the latter are `STATISTIC_NAMES`."""

    weights: np.ndarray
    statistics: np.ndarray

    def as_dict(self) -> dict[str, np.ndarray]:
        """The Gymnasium form."""
        return {"weights": self.weights, "statistics": self.statistics}


def observe(model: nn.Module, group: FilterGroup, images: Tensor, labels: Tensor, batch: int = 256) -> Observation:
    """Read one filter group of `model` (evaluation mode, left as it was found).

    Args:
        model: the network; its state and mode are not changed.
        group: the filter group.
        images: (B, C, H, W) float images that may be looked at freely (the fit split).
        labels: (B,) int64.
        batch: images a forward pass.
    """
    weights = filter_weights(model, group)
    columns = {
        "l1": weights.abs().mean(1),
        "l2": weights.square().mean(1).sqrt(),
        "weight_mean": weights.mean(1),
        "weight_std": weights.std(1, correction=0),
        **_batch_norm_columns(model, group),
        **_activation_columns(model, group, images, labels, batch),
        **_consumer_columns(model, group),
    }
    statistics = torch.stack([columns[name].float().cpu() for name in STATISTIC_NAMES], dim=1)
    return Observation(weights.cpu().numpy(), torch.nan_to_num(statistics).numpy())


def filter_weights(model: nn.Module, group: FilterGroup) -> Tensor:
    """The root convolution's filters as a matrix (N, D), float32."""
    module = model.get_submodule(group.name)
    weight = _output_major(module).detach().float()
    rows = torch.as_tensor(group.producers[0].channels, device=weight.device)
    return weight[rows.reshape(-1)].reshape(group.n_filters, -1)


def _output_major(module: nn.Module) -> Tensor:
    """Weight with output channels first; a transposed convolution stores (in, out / groups, ...)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.transpose(0, 1) if isinstance(module, nn.modules.conv._ConvTransposeNd) else weight


def _batch_norm_columns(model: nn.Module, group: FilterGroup) -> dict[str, Tensor]:
    for cut in group.cuts:
        module = model.get_submodule(cut.module)
        if isinstance(module, _BatchNorm) and module.affine:
            rows = torch.as_tensor(cut.channels[:, 0], device=module.weight.device)
            return {"bn_scale": module.weight.detach()[rows].abs(), "bn_shift": module.bias.detach()[rows]}
    return {"bn_scale": torch.ones(group.n_filters), "bn_shift": torch.zeros(group.n_filters)}


def _consumer_columns(model: nn.Module, group: FilterGroup) -> dict[str, Tensor]:
    """Mean absolute and root mean square weight with which consumers read each filter."""
    absolute, square, count = torch.zeros(group.n_filters), torch.zeros(group.n_filters), 0
    for cut in group.consumers:
        module = model.get_submodule(cut.module)
        weight = _output_major(module).detach().float().cpu()
        if weight.shape[1] <= int(cut.channels.max()):  # a grouped consumer stores in / groups columns
            continue
        read = weight.transpose(0, 1)[torch.as_tensor(cut.channels)].reshape(group.n_filters, -1)
        absolute, square, count = absolute + read.abs().sum(1), square + read.square().sum(1), count + read.shape[1]
    return {"consumer_l1": absolute / max(count, 1), "consumer_l2": (square / max(count, 1)).sqrt()}


def _activation_columns(
    model: nn.Module, group: FilterGroup, images: Tensor, labels: Tensor, batch: int
) -> dict[str, Tensor]:
    """Mean activation, APoZ (Hu et al. 2016), Taylor (Molchanov et al. 2017, eq. 8) and redundancy, at the consumer."""
    n = group.n_filters
    mean, zeros, taylor = torch.zeros(n), torch.zeros(n), torch.zeros(n)
    gram = torch.zeros(n, n, dtype=torch.float64)
    count = 0
    for start in range(0, len(images), batch):
        activation, gradient = _activation_and_gradient(
            model, group.consumers[0], images[start : start + batch], labels[start : start + batch]
        )
        size = len(activation)
        mean += activation.mean(2).sum(0).cpu()
        zeros += (activation <= 0).float().mean(2).sum(0).cpu()
        # The loss of an image enters the batch mean with 1 / size: undo it, so that the batch size does not matter.
        taylor += (activation * gradient * size).mean(2).abs().sum(0).cpu()
        flat = activation.transpose(0, 1).reshape(n, -1)
        gram += (flat @ flat.T).double().cpu()
        count += size
    return {
        "mean_activation": mean / count,
        "apoz": zeros / count,
        "taylor": taylor / count,
        "redundancy": _redundancy(gram),
    }


def _activation_and_gradient(model: nn.Module, consumer: Cut, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What `consumer` reads of the group, and the loss gradient there: two (B, N, R * P) tensors."""
    seen: list[Tensor] = []

    def keep_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # A fresh leaf: the gradient of everything behind it is all that is needed, and frozen weights stay untouched.
        leaf = inputs[0].detach().requires_grad_() if not seen else inputs[0]
        seen.append(leaf)
        return (leaf, *inputs[1:])

    training = {module: module.training for module in model.modules()}
    handle = model.get_submodule(consumer.module).register_forward_pre_hook(keep_input)
    try:
        model.eval()
        with torch.enable_grad():
            loss = functional.cross_entropy(model(images), labels)
            (gradient,) = torch.autograd.grad(loss, seen[0])
    finally:
        handle.remove()
        for module, mode in training.items():
            module.training = mode
    return _filters_first(seen[0].detach(), consumer), _filters_first(gradient, consumer)


def _filters_first(tensor: Tensor, consumer: Cut) -> Tensor:
    """(B, C, ...) -> (B, N, R * P): the channels of each filter, with their positions behind them."""
    n, r = consumer.channels.shape
    rows = torch.as_tensor(consumer.channels.reshape(-1), device=tensor.device)
    if tensor.dim() == 2:
        return tensor[:, rows].reshape(len(tensor), n, r).float()
    return tensor[:, rows].reshape(len(tensor), n, -1).float()


def _redundancy(gram: Tensor) -> Tensor:
    """Share of each filter's energy that the other filters explain linearly: 1 - 1 / (G_ii (G^-1)_ii), in [0, 1].

    1 means that the others can stand in for it entirely. Ridge: 1e-6 of the mean energy.
    """
    energy = gram.diagonal()
    ridge = 1e-6 * energy.mean().clamp_min(1e-12)
    inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return (1 - 1 / ((energy + ridge) * inverse.diagonal())).clamp(0, 1)
