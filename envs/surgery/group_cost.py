"""Cost of a network once filters are gone, without building it: exact arithmetic on the counted dense network."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import nn

from ..networks.module_kinds import is_recurrent, n_products
from .slicing import axes_of_parameter, width
from .whole_blocks import constant, is_within

if TYPE_CHECKING:
    from ..networks.cost import Cost
    from .filter_group import Branch, FilterGroup


def pruned_cost(model: nn.Module, cost: Cost, kept: Mapping[FilterGroup, int]) -> tuple[int, int]:
    """MACs per image and parameters when each group keeps the given number of its filters.

    Which filters go does not matter, only how many. Equal to `count_cost` of the pruned network (a test compares).

    Args:
        model: the network the groups were found in.
        cost: its `count_cost`.
        kept: filters kept, 0 to N, by group; groups that are not named keep all. Where a group of a branch keeps none,
            the branch has vanished: its constant is left, and counts as parameters.
    """
    ended = tuple(dict.fromkeys(group.branch for group, n in kept.items() if n == 0 and group.branch is not None))
    shares: dict[str, defaultdict[str, Fraction]] = defaultdict(lambda: defaultdict(lambda: Fraction(1)))
    for group, n_kept in kept.items():
        if not 0 <= n_kept <= group.n_filters:
            raise ValueError(f"group {group.name!r} cannot keep {n_kept} of its {group.n_filters} filters.")
        if group.branch is not None and group.branch in ended:
            continue
        for cut in group.cuts:
            gone = (group.n_filters - n_kept) * cut.channels.shape[1]
            shares[cut.module][cut.axis] -= Fraction(gone, width(model.get_submodule(cut.module), cut.axis))
    dead = {each for branch in ended for each in (*branch.inside, branch.tail)}
    macs, params = _without(model, cost, dead)
    params += sum(_constants(model, branch, shares) for branch in ended)
    counted: set[nn.Parameter] = set()  # one that several layers share goes once
    for name, share in shares.items():
        if is_within(name, dead):
            continue
        module, lost = model.get_submodule(name), {}
        for key, parameter in module.named_parameters(recurse=False):
            axes = [*axes_of_parameter(module, key), *(axis for axis in share if axis.startswith(f"{key}:"))]
            lost[key] = int(parameter.numel() * (1 - math.prod(share[axis] for axis in axes)))
            params -= 0 if parameter in counted else lost[key]
            counted.add(parameter)
        if name in cost.modules:
            macs -= _lost_macs(module, cost.modules[name].macs, share, lost)
    return macs, params


def _without(model: nn.Module, cost: Cost, dead: Collection[str]) -> tuple[int, int]:
    """MACs and parameters of everything but these modules; no other module has a part in their parameters."""
    whole = [each for name, each in cost.modules.items() if is_within(name, dead)]
    return cost.macs - sum(each.macs for each in whole), cost.params - sum(each.params for each in whole)


def _constants(model: nn.Module, branch: Branch, shares: Mapping[str, Mapping[str, Fraction]]) -> int:
    """What is left of a vanished branch: a number for each channel that is left where it ended."""
    share = next((shares[name]["out"] for name in reversed(branch.chain) if "out" in shares.get(name, ())), Fraction(1))
    return int(len(constant(model, branch)) * share)


def _lost_macs(module: nn.Module, macs: int, share: Mapping[str, Fraction], lost: Mapping[str, int]) -> int:
    if not is_recurrent(module):
        return int(macs * (1 - share["out"] * share["in"]))
    # Every weight of a recurrent layer is used once a step, and only those that read its input become fewer.
    return int(Fraction(macs * sum(lost.values()), n_products(module)))
