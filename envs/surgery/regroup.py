"""The groups of a network after a cut, without looking for them again: fewer filters, channels counted anew.

Shapes: N filters of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from .cutting import kept_rows
from .filter_group import Cut, FilterGroup
from .slicing import Rows


def regrouped(
    groups: Sequence[FilterGroup], model: nn.Module, choices: Mapping[FilterGroup, Tensor]
) -> tuple[FilterGroup, ...]:
    """The groups as `prune(model, choices)` has them, in the same order and under the same names.

    Args:
        groups: of `model`, all that are to be followed.
        model: the network before the cut.
        choices: keep mask (N,) bool of each group that is cut; the others keep all.
    """
    kept = kept_rows(model, choices)
    return tuple(_shrunk(group, choices.get(group), kept) for group in groups)


def _shrunk(group: FilterGroup, keep: Tensor | None, kept: Mapping[str, Mapping[str, Rows]]) -> FilterGroup:
    rows = np.arange(group.n_filters) if keep is None else np.flatnonzero(keep.cpu().numpy())
    cuts = []
    for cut in group.cuts:
        channels, left = cut.channels[rows], kept.get(cut.module, {}).get(cut.axis)
        if left is not None:
            channels = np.searchsorted(left, channels).astype(np.int64)
        cuts.append(Cut(cut.module, cut.axis, channels, cut.kind))
    return FilterGroup(group.name, len(rows), tuple(cuts))
