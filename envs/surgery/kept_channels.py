"""Kept channels: which ones of the dense network are left after a series of cuts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..networks.module_kinds import is_depthwise
from .cutting import find_module, kept_rows
from .filter_group import FilterGroup
from .slicing import Rows, width


@dataclass(frozen=True)
class KeptChannels:
    """Which channels of the dense network are left: module -> axis ("out", "in") -> their numbers there, ascending.

    Networks are pruned step by step, and each step renumbers channels; `after` translates. Modules that were never
    touched do not appear. `widths` holds how many channels the dense network has there.
    """

    rows: Mapping[str, Mapping[str, Rows]] = field(default_factory=dict)
    widths: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def after(self, model: nn.Module, choices: Mapping[FilterGroup, Tensor]) -> KeptChannels:
        """What is left once `prune(model, choices)` has run; `model` is the network before that step."""
        merged = {name: dict(axes) for name, axes in self.rows.items()}
        widths = {name: dict(axes) for name, axes in self.widths.items()}
        for name, axes in kept_rows(model, choices).items():
            module, known = find_module(model, name), merged.setdefault(name, {})
            if isinstance(module, _ConvNd) and is_depthwise(module) and "in" in known:
                # A grouped convolution whose blocks were pruned down to one input: from then on inputs follow outputs.
                axes["in"] = np.unique(axes["out"] // (module.out_channels // module.in_channels))
            for axis, rows in axes.items():
                widths.setdefault(name, {}).setdefault(axis, width(module, axis))
                before = known.get(axis)
                known[axis] = np.arange(width(module, axis), dtype=np.int64)[rows] if before is None else before[rows]
        return KeptChannels(merged, widths)

    def as_lists(self) -> dict[str, dict[str, list[int]]]:
        """The JSON form."""
        return {name: {axis: rows.tolist() for axis, rows in axes.items()} for name, axes in self.rows.items()}
