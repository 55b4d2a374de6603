"""Folding a mask or a channel mix from a consumer's input into its weights: conv(P x, W) == conv(x, W P).

Exact for convolutions (whatever their padding), transposed convolutions, linear and recurrent layers. With a mask not
even a bit changes (zero weight instead of zero input), and no activation has to be copied.

Shapes: C input channels of a consumer, K outputs, M masks, N filters, R channels of the consumer that belong to one
filter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..networks.module_kinds import is_leaf, is_recurrent, is_transposed, reading_weights
from .filter_group import Cut


def mixing_obstacle(module: nn.Module, cut: Cut) -> str | None:
    """Why the channels of `cut` cannot be mixed inside the weights of `module`, or None if they can."""
    if is_recurrent(module):
        return None
    if not is_leaf(module):
        return f"{cut.module!r} is a {type(module).__name__} with a forward of its own"
    if not isinstance(module, _ConvNd) or module.groups == 1:
        return None
    blocks = cut.channels // (module.in_channels // module.groups)
    if (blocks == blocks[:1]).all():
        return None
    return f"the grouped convolution {cut.module!r} reads its filters in different blocks"


def reading_weight(module: nn.Module) -> Tensor:
    """The weights that multiply what `module` reads; of a recurrent layer of two directions a copy, both stacked."""
    found = [getattr(module, name) for name in reading_weights(module)]
    return found[0] if len(found) == 1 else torch.cat([each.detach() for each in found])


@torch.no_grad()
def set_reading_weight(module: nn.Module, weight: Tensor) -> None:
    """Copy `weight` over `reading_weight(module)`."""
    own = [getattr(module, name) for name in reading_weights(module)]
    for each, value in zip(own, weight.split([len(each) for each in own]), strict=True):
        each.copy_(value)


def by_input(module: nn.Module, weight: Tensor) -> Tensor:
    """A view of `weight` with the input channel first: (C, outputs that read it, ...)."""
    if is_transposed(module):
        return weight
    groups = module.groups if isinstance(module, _ConvNd) else 1
    if groups == 1:
        return weight.transpose(0, 1)
    blocks = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return blocks.reshape(-1, *blocks.shape[2:])


def from_input(module: nn.Module, weight: Tensor) -> Tensor:
    """The inverse of `by_input`."""
    if is_transposed(module):
        return weight
    groups = module.groups if isinstance(module, _ConvNd) else 1
    if groups == 1:
        return weight.transpose(0, 1)
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def fold(module: nn.Module, weight: Tensor, cut: Cut, choice: Tensor) -> Tensor:
    """Weights of `module` that act on the plain input as `weight` would on the masked or mixed one.

    Args:
        module: the consumer; only its kind is read.
        weight: its weights, left as they are.
        cut: the group's channels at this consumer.
        choice: keep mask (N,) bool, or a mix (N, N) floating point: x' = P x over filters.
    """
    rows = torch.as_tensor(cut.channels, device=weight.device)
    first = by_input(module, weight).clone(memory_format=torch.preserve_format)
    if choice.dtype == torch.bool:
        first[rows[~choice.to(weight.device)].reshape(-1)] = 0
    else:
        # x'_i = sum_k P_ik x_k, so the weight that filter i had goes to filter k with factor P_ik.
        first[rows] = torch.einsum("ik,ir...->kr...", choice.to(weight), first[rows])
    return from_input(module, first)


def fold_all(weights: Tensor, cut: Cut, choices: Tensor) -> Tensor:
    """`fold` for M masks at once, of a convolution without groups or a linear layer.

    Args:
        weights: (M, K, C, ...), one for each mask; overwritten.
        cut: the group's channels at this consumer.
        choices: keep masks (M, N) bool, or mixes (M, N, N).
    """
    rows = torch.as_tensor(cut.channels, device=weights.device)
    first, choices = weights.transpose(1, 2), choices.to(weights)
    if choices.dim() == 2:
        first[:, rows] *= choices.view(*choices.shape, *[1] * (first.dim() - 1))
    else:
        first[:, rows] = torch.einsum("mik,mir...->mkr...", choices, first[:, rows])
    return weights
