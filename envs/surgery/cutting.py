"""Surgery: filters cut out of a network, as a new, smaller network of the same classes.

Shapes: N filters of a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UserError
from ..networks.copying import copied
from ..networks.memory_layout import inherit_layout
from .filter_group import Branch, FilterGroup, vanished
from .shared_weights import shared_parameters, tie_again
from .slicing import Rows, axes_of, checked_rows, is_tensor_axis, slice_axes, slice_tensor, width
from .whole_blocks import find_module, vanish

KeptRows = Mapping[str, Mapping[str, Rows]]
"""Module -> axis (`filter_group.Axis`) -> kept channels, ascending."""


def prune(model: nn.Module, choices: Mapping[FilterGroup, Tensor]) -> nn.Module:
    """A copy of `model` without the dropped filters; `model` itself is untouched, bit for bit.

    Args:
        model: the network the groups were found in.
        choices: keep mask (N,) bool of each group.

    The copy has parameters of its own (an optimiser made for `model` does not know them), the same training mode and
    the same `requires_grad`. A mask that keeps nothing of a branch lets the whole block vanish (`whole_blocks`).

    Raises UserError for a mask of another length or dtype, one that keeps nothing where something has to stay, channels
    that do not exist or that two groups claim.
    """
    return cut_channels(model, kept_rows(model, choices), vanished(choices))


def kept_rows(model: nn.Module, choices: Mapping[FilterGroup, Tensor]) -> dict[str, dict[str, Rows]]:
    """What stays of every module that the choices touch; of layers in a branch that vanishes, what was cut besides."""
    choices = {group: checked_keep(group, keep) for group, keep in choices.items()}
    gone = vanished(choices)
    dropped: dict[tuple[str, str], list[int]] = defaultdict(list)
    for group, keep in choices.items():
        if group.branch is not None and group.branch in gone:
            continue
        lost = ~keep.numpy()
        for cut in group.cuts:
            module = find_module(model, cut.module)
            if cut.channels.max() >= width(module, cut.axis):
                raise UserError(
                    f"Group {group.name!r} cuts {cut.axis!r} channel {cut.channels.max()} of {cut.module!r}, which has "
                    f"only {width(module, cut.axis)}; find the groups of this network again."
                )
            dropped[cut.module, cut.axis].extend(cut.channels[lost].reshape(-1).tolist())
    kept: dict[str, dict[str, Rows]] = defaultdict(dict)
    for (name, axis), rows in dropped.items():
        if len(set(rows)) != len(rows):
            raise UserError(f"Two of the chosen groups claim the same {axis!r} channels of {name!r}.")
        total = width(find_module(model, name), axis)
        kept[name][axis] = np.setdiff1d(np.arange(total, dtype=np.int64), np.array(rows, dtype=np.int64))
    return dict(kept)


def cut_channels(
    model: nn.Module, kept: KeptRows, branches: Sequence[Branch] = (), values: Sequence[Tensor | None] = ()
) -> nn.Module:
    """A copy of `model` with only these channels; every list is checked (`slicing.checked_rows`).

    Layers that share a parameter and lose the same channels share it in the copy as well. `branches` vanish once the
    channels are cut; `values` are their constants, if those are known.
    """
    smaller = copied(model)
    shared = shared_parameters(smaller)
    with torch.no_grad():
        for name, axes in kept.items():
            module = find_module(smaller, name)
            tensors = [axis for axis in axes if is_tensor_axis(axis)]
            unknown = set(axes) - {*axes_of(module), *tensors}
            if unknown:
                raise UserError(f"Module {name!r} ({type(module).__name__}) has no axis {sorted(unknown)[0]!r} to cut.")
            for axis in tensors:
                slice_tensor(module, axis, checked_rows(name, module, axis, axes[axis]))
            if len(tensors) < len(axes):
                slice_axes(name, module, axes)
    tie_again(smaller, shared)
    vanish(smaller, branches, values)
    inherit_layout(smaller, model)
    return smaller


def checked_masks(group: FilterGroup, masks: Tensor) -> Tensor:
    """Masks (M, N) as bool; ValueError for another shape and for one that keeps nothing but has to."""
    masks_MN = torch.as_tensor(masks, dtype=torch.bool)
    if masks_MN.dim() != 2 or masks_MN.shape[1] != group.n_filters:
        raise ValueError(
            f"masks of {group.name!r} have shape {tuple(masks_MN.shape)}, expected (M, {group.n_filters})."
        )
    if group.branch is None and not bool(masks_MN.any(1).all()):
        raise ValueError(f"a mask of {group.name!r} keeps no filter at all; keep at least one.")
    return masks_MN


def checked_keep(group: FilterGroup, keep: Tensor) -> Tensor:
    """`keep` on the CPU, if it is a (N,) bool mask of `group` that keeps what it has to; UserError otherwise."""
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or tuple(keep.shape) != (group.n_filters,):
        came = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise UserError(f"The keep mask of {group.name!r} must be a bool tensor ({group.n_filters},), got {came}.")
    if group.branch is None and not bool(keep.any()):
        raise UserError(f"The mask of {group.name!r} keeps none of its {group.n_filters} filters; keep at least one.")
    return keep.cpu()
