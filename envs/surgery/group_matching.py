"""Matching of filter groups before and after a cut: followed through it, or recognised by where their channels were.

A group is named after its first convolution and, if that has several groups, after a channel; both may change as
neighbours are cut. Seen from the dense network they do not.

Shapes: N filters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..networks.module_kinds import is_depthwise
from .cutting import KeptRows, kept_rows
from .filter_group import SINGLE, Branch, Cut, FilterGroup, GroupPlan, Skipped, vanished
from .kept_channels import KeptChannels
from .slicing import Rows, tensor_axis
from .whole_blocks import VALUE, find_module, is_within


def named_as(found: GroupPlan, dense: GroupPlan, kept: KeptChannels) -> GroupPlan:
    """The groups of a pruned network under the names they have in the dense one.

    Args:
        found: the pruned network's groups.
        dense: the dense network's.
        kept: the channels that are left.

    A group that the dense network does not offer is not offered here either.
    """
    groups = []
    for group in found.groups:
        twin = dense_rows(group, dense, kept)
        if twin is not None:
            groups.append(replace(group, name=twin[0].name))
    return GroupPlan(tuple(groups), found.skipped, found.notes)


def left_of(dense: GroupPlan, model: nn.Module, kept: KeptChannels) -> GroupPlan | None:
    """The groups of a pruned network as `named_as` has them, followed through the cuts instead of found again.

    Args:
        dense: the dense network's groups.
        model: the dense network.
        kept: the channels that are left.

    None where the cuts may have made other groups: where blocks have vanished, or a grouped convolution became a
    depthwise one.
    """
    cuts = {cut for group in dense.groups for cut in group.cuts}
    if kept.branches or any(_is_grouped(find_module(model, cut.module)) for cut in cuts):
        return None
    groups: list[FilterGroup] = []
    single: list[str] = []
    for group in dense.groups:
        root = group.cuts[0]
        left = kept.rows.get(root.module, {}).get(root.axis)
        rows = np.arange(group.n_filters) if left is None else np.flatnonzero(np.isin(root.channels, left).all(1))
        if len(rows) > 1:
            groups.append(_renumbered(restricted(group, rows), kept.rows))
        else:
            single.extend(cut.module for cut in group.producers)
    covered = {cut.module for group in groups for cut in group.producers}
    makers = [name for name in dict.fromkeys(single) if isinstance(find_module(model, name), _ConvNd)]
    skipped = tuple(Skipped(name, SINGLE) for name in makers if name not in covered)
    return GroupPlan(tuple(groups), dense.skipped + skipped, dense.notes)


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module)


def dense_rows(group: FilterGroup, dense: GroupPlan, kept: KeptChannels) -> tuple[FilterGroup, Rows] | None:
    """The dense network's group that `group` is left of, and which of its filters these are, in their order.

    None if the dense network has no group in which these filters go together.
    """
    root = group.cuts[0]
    places = original_channels(root, kept)[:, 0]
    for twin in dense.groups:
        for cut in twin.producers:
            if cut.module == root.module and np.isin(places, cut.channels).all():
                owner = {int(channel): row for row, channels in enumerate(cut.channels) for channel in channels}
                return twin, np.array([owner[int(place)] for place in places], dtype=np.int64)
    return None


def restricted(group: FilterGroup, rows: Rows) -> FilterGroup:
    """The group with these of its filters only, in this order."""
    cuts = tuple(Cut(each.module, each.axis, each.channels[rows], each.kind) for each in group.cuts)
    return replace(group, n_filters=len(rows), cuts=cuts)


def original_channels(cut: Cut, kept: KeptChannels) -> Rows:
    """The channels of a cut as the dense network numbers them."""
    known = kept.rows.get(cut.module, {}).get(cut.axis)
    return cut.channels if known is None else known[cut.channels]


def regrouped(
    groups: Sequence[FilterGroup], model: nn.Module, choices: Mapping[FilterGroup, Tensor]
) -> tuple[FilterGroup, ...]:
    """The groups as `prune(model, choices)` has them, in the same order and under the same names, without searching.

    Groups of a vanished block are not among them.

    Args:
        groups: of `model`, all that are to be followed.
        model: the network before the cut.
        choices: keep mask (N,) bool of each group that is cut; the others keep all filters.
    """
    kept, gone = kept_rows(model, choices), vanished(choices)
    left = [group for group in groups if group.branch is None or group.branch not in gone]
    return tuple(_without(_shrunk(group, choices.get(group), kept), gone) for group in left)


def _without(group: FilterGroup, gone: Sequence[Branch]) -> FilterGroup:
    """The group without the layers of vanished branches: of one that ended in it, the constant is cut with it."""
    dead = [name for branch in gone for name in (*branch.inside, branch.tail)]
    cuts = [cut for cut in group.cuts if not is_within(cut.module, dead)]
    if len(cuts) == len(group.cuts):
        return group
    for branch in gone:
        ends = [cut for name in branch.chain for cut in group.cuts if (cut.module, cut.axis) == (name, "out")]
        if ends:
            cuts.append(Cut(branch.tail, tensor_axis(VALUE, 0), ends[-1].channels, "pass"))
    # The root, which names a group and holds its filters, makes them.
    return replace(group, cuts=tuple(sorted(cuts, key=lambda cut: cut.kind != "producer")))


def _shrunk(group: FilterGroup, keep: Tensor | None, kept: KeptRows) -> FilterGroup:
    rows = np.arange(group.n_filters) if keep is None else np.flatnonzero(keep.cpu().numpy())
    return _renumbered(restricted(group, rows), kept)


def _renumbered(group: FilterGroup, kept: KeptRows) -> FilterGroup:
    """The group with its channels numbered as they are among those that are kept."""
    cuts = []
    for cut in group.cuts:
        channels, left = cut.channels, kept.get(cut.module, {}).get(cut.axis)
        if left is not None:
            channels = np.searchsorted(left, channels).astype(np.int64)
        cuts.append(Cut(cut.module, cut.axis, channels, cut.kind))
    return replace(group, cuts=tuple(cuts))
