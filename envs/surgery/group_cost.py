"""Cost of a network once filters are gone, without building it: exact arithmetic on the counted dense network."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import nn

from ..networks.module_kinds import is_recurrent, n_products
from .slicing import axes_of_parameter, width

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
    shares: dict[str, defaultdict[str, Fraction]] = defaultdict(lambda: defaultdict(lambda: Fraction(1)))
    for group, n_kept in kept.items():
        if not 0 <= n_kept <= group.n_filters:
            raise ValueError(f"group {group.name!r} cannot keep {n_kept} of its {group.n_filters} filters.")
        for cut in group.cuts:
            gone = (group.n_filters - n_kept) * cut.channels.shape[1]
            shares[cut.module][cut.axis] -= Fraction(gone, width(model.get_submodule(cut.module), cut.axis))
    macs, params = cost.macs, cost.params
    counted: set[nn.Parameter] = set()  # one that several layers share goes once
    for name, share in shares.items():
        module, lost = model.get_submodule(name), {}
        for key, parameter in module.named_parameters(recurse=False):
            axes = [*axes_of_parameter(module, key), *(axis for axis in share if axis.startswith(f"{key}:"))]
            lost[key] = int(parameter.numel() * (1 - math.prod(share[axis] for axis in axes)))
            params -= 0 if parameter in counted else lost[key]
            counted.add(parameter)
        if name in cost.modules:
            macs -= _lost_macs(module, cost.modules[name].macs, share, lost)
    return macs, params


def _lost_macs(module: nn.Module, macs: int, share: Mapping[str, Fraction], lost: Mapping[str, int]) -> int:
    if not is_recurrent(module):
        return int(macs * (1 - share["out"] * share["in"]))
    # Every weight of a recurrent layer is used once a step, and only those that read its input become fewer.
    return int(Fraction(macs * sum(lost.values()), n_products(module)))
