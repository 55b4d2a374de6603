"""Masking in its plain form: a keep mask at the input of every layer that reads the group's filters.

It is slow, and exact for every network: the reference for the fast evaluator and for surgery. Zeroing a filter's
weights is not removing it: what stands behind a normalisation would still see its shift.

Shapes: N filters, R channels of a consumer that belong to one filter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..networks.hooks import removed_after
from ..networks.module_kinds import is_conv
from .filter_group import Cut, FilterGroup, vanished

MixKey = tuple[str, str]
"""Name of the group, name of the consumer."""


@contextmanager
def masked_inputs(
    model: nn.Module, choices: Mapping[FilterGroup, Tensor], mixes: Mapping[MixKey, Tensor] | None = None
) -> Iterator[nn.Module]:
    """Within the context `model` runs as if the dropped filters were gone; afterwards it is as it was.

    Args:
        model: the network the groups were found in.
        choices: keep mask (N,) bool of each group. Where one keeps nothing of a branch, the branch's last filters are
            masked, which leaves the others without effect.
        mixes: for (group, consumer) a matrix (N, N) that is applied instead of the mask, x' = P x over filters.
    """
    with removed_after(_masks(model, choices, mixes or {})):
        yield model


def _masks(
    model: nn.Module, choices: Mapping[FilterGroup, Tensor], mixes: Mapping[MixKey, Tensor]
) -> Iterator[RemovableHandle]:
    gone = vanished(choices)
    for branch in gone:
        yield model.get_submodule(branch.chain[0]).register_forward_pre_hook(_nothing)
    for group, keep in choices.items():
        if group.branch is not None and group.branch in gone:
            continue
        matrix = torch.diag(keep.cpu().to(torch.float64))
        for cut in group.consumers:
            mix = mixes.get((group.name, cut.module), matrix)
            yield model.get_submodule(cut.module).register_forward_pre_hook(_mixer(cut, mix))


def channel_dim(module: nn.Module, value: Tensor) -> int:
    """Dimension of a consumer's input that holds its channels."""
    if is_conv(module):
        spatial = module.kernel_size
        assert isinstance(spatial, tuple)
        return value.dim() - len(spatial) - 1
    return value.dim() - 1


def batch_dim(module: nn.Module, value: Tensor) -> int:
    """Dimension of a consumer's input that holds the images; a recurrent layer may put the steps first."""
    return 1 if isinstance(module, nn.RNNBase) and not module.batch_first and value.dim() == 3 else 0


def _nothing(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.zeros_like(inputs[0]), *inputs[1:])


def _mixer(cut: Cut, mix: Tensor) -> Any:
    rows = torch.as_tensor(cut.channels)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value = inputs[0].movedim(channel_dim(module, inputs[0]), -1).clone()
        part = value[..., rows.to(value.device)]
        value[..., rows.to(value.device)] = torch.einsum("ik,...kr->...ir", mix.to(value), part)
        return (value.movedim(-1, channel_dim(module, inputs[0])), *inputs[1:])

    return hook
