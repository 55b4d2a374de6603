"""Cost of a network once filters are gone, without building it: exact arithmetic on the counted dense network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import nn

from .slicing import width

if TYPE_CHECKING:
    from ..networks.cost import Cost
    from .filter_group import FilterGroup


def pruned_cost(model: nn.Module, cost: Cost, kept: Mapping[FilterGroup, int]) -> tuple[int, int]:
    """MACs per image and parameters when each group keeps the given number of its filters.

    Which filters go does not matter, only how many. Equal to `count_cost` of the pruned network (a test compares).

    Args:
        model: the network the groups were found in.
        cost: its `count_cost`.
        kept: filters kept, 0 to N, by group; groups that are not named keep all.
    """
    shares: dict[str, dict[str, Fraction]] = defaultdict(lambda: {"out": Fraction(1), "in": Fraction(1)})
    for group, n_kept in kept.items():
        if not 0 <= n_kept <= group.n_filters:
            raise ValueError(f"group {group.name!r} cannot keep {n_kept} of its {group.n_filters} filters.")
        for cut in group.cuts:
            gone = (group.n_filters - n_kept) * cut.channels.shape[1]
            shares[cut.module][cut.axis] -= Fraction(gone, width(model.get_submodule(cut.module), cut.axis))
    macs, params = cost.macs, cost.params
    for name, share in shares.items():
        both = share["out"] * share["in"]
        if name in cost.modules:
            macs -= int(cost.modules[name].macs * (1 - both))
        for parameter in model.get_submodule(name).parameters(recurse=False):
            params -= int(parameter.numel() * (1 - (share["out"] if parameter.dim() == 1 else both)))
    return macs, params
