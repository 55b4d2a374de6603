"""Kept channels: which ones of the dense network are left after a series of cuts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..networks.module_kinds import is_depthwise
from .cutting import kept_rows
from .filter_group import Branch, FilterGroup, vanished
from .slicing import Rows, width
from .whole_blocks import find_module, is_within


@dataclass(frozen=True)
class KeptChannels:
    """Which channels of the dense network are left: module -> axis ("out", "in") -> their numbers there, ascending.

    Networks are pruned step by step, and each step renumbers channels; `after` translates. Modules that were never
    touched do not appear, nor do those of vanished blocks, which are in `branches`. `widths` holds how many channels
    the dense network has there.
    """

    rows: Mapping[str, Mapping[str, Rows]] = field(default_factory=dict)
    widths: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()

    def after(self, model: nn.Module, choices: Mapping[FilterGroup, Tensor]) -> KeptChannels:
        """What is left once `prune(model, choices)` has run; `model` is the network before that step."""
        branches = self.branches + vanished(choices)
        gone = [name for branch in branches for name in (*branch.inside, branch.tail)]
        merged = {name: dict(axes) for name, axes in self.rows.items() if not is_within(name, gone)}
        widths = {name: dict(axes) for name, axes in self.widths.items() if not is_within(name, gone)}
        for name, axes in kept_rows(model, choices).items():
            if is_within(name, gone):
                continue
            module, known = find_module(model, name), merged.setdefault(name, {})
            if isinstance(module, _ConvNd) and is_depthwise(module) and "in" in known:
                # A grouped convolution whose blocks were pruned down to one input: from then on inputs follow outputs.
                axes["in"] = np.unique(axes["out"] // (module.out_channels // module.in_channels))
            for axis, rows in axes.items():
                widths.setdefault(name, {}).setdefault(axis, width(module, axis))
                before = known.get(axis)
                known[axis] = np.arange(width(module, axis), dtype=np.int64)[rows] if before is None else before[rows]
        return KeptChannels(merged, widths, branches)

    def n_kept(self, group: FilterGroup) -> int:
        """How many filters of a group of the dense network are left."""
        root = group.cuts[0]
        if is_within(root.module, [name for branch in self.branches for name in (*branch.inside, branch.tail)]):
            return 0
        rows = self.rows.get(root.module, {}).get(root.axis)
        return group.n_filters if rows is None else int(np.isin(root.channels, rows).all(1).sum())

    def as_lists(self) -> dict[str, dict[str, list[int]]]:
        """The JSON form."""
        return {name: {axis: rows.tolist() for axis, rows in axes.items()} for name, axes in self.rows.items()}
