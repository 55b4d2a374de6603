"""MACs target that every method meets in the same way: a ranking of all filters, cut off where the budget ends.

Shapes: N filters of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..networks.cost import Cost
from .filter_group import FilterGroup
from .slicing import width

SCOPES = ("groups", "network")
SLACK = 1e-9  # products of fractions differ from whole MACs in the last bits


@dataclass(frozen=True)
class Target:
    """How much is to be removed.

    Args:
        removed: fraction of the MACs, between 0 and 1.
        of: whose: "groups" for those of the layers that make the pruned filters (first convolutions of a residual
            block: only these), "network" for all.
    """

    removed: float
    of: str = "groups"

    def __post_init__(self) -> None:
        if not 0 < self.removed < 1:
            hint = f"; did you mean {self.removed / 100:g}?" if 1 <= self.removed < 100 else "."
            raise UserError(f"A target of {self.removed:g} was given; expected a fraction between 0 and 1{hint}")
        if self.of not in SCOPES:
            raise UserError(f"targets.of is {self.of!r}; expected one of {', '.join(SCOPES)}.")


@dataclass(frozen=True)
class _Share:
    """MACs of one module, and how its channels shrink: (position of a group, share of one of its filters)."""

    macs: int
    out: tuple[tuple[int, float], ...]
    into: tuple[tuple[int, float], ...]

    def at(self, dropped: Sequence[int]) -> float:
        """MACs left when that many filters of each group are gone."""
        out = 1.0 - sum(share * dropped[position] for position, share in self.out)
        return self.macs * out * (1.0 - sum(share * dropped[position] for position, share in self.into))


class MacsMeter:
    """MACs of a network by filters kept per group: `group_cost.pruned_cost` made fast enough to search with.

    Args:
        model: the network the groups were found in.
        cost: its `count_cost`.
        groups: the groups that may be pruned.
        of: whose MACs are counted, as in `Target`.
    """

    def __init__(self, model: nn.Module, cost: Cost, groups: Sequence[FilterGroup], of: str = "groups") -> None:
        self.groups = tuple(groups)
        producers = {cut.module for group in groups for cut in group.producers}
        counted = producers if of == "groups" else set(cost.modules)
        self._modules = [
            _Share(module.macs, self._shares(model, name, "out"), self._shares(model, name, "in"))
            for name, module in cost.modules.items()
            if name in counted
        ]
        self.whole = sum(module.macs for module in self._modules)

    def _shares(self, model: nn.Module, name: str, axis: str) -> tuple[tuple[int, float], ...]:
        return tuple(
            (position, cut.channels.shape[1] / width(model.get_submodule(name), axis))
            for position, group in enumerate(self.groups)
            for cut in group.cuts
            if cut.module == name and cut.axis == axis
        )

    def macs(self, kept: Sequence[int]) -> float:
        """MACs per image when the group at position i keeps `kept[i]` filters."""
        dropped = [group.n_filters - n for group, n in zip(self.groups, kept, strict=True)]
        return sum(module.at(dropped) for module in self._modules)

    def removed(self, kept: Sequence[int]) -> float:
        """The fraction of `whole` that is gone."""
        return 1.0 - self.macs(kept) / self.whole

    def check(self, target: Target) -> None:
        """UserError for a target that is missed even with one filter per group."""
        most = self.removed([1] * len(self.groups))
        if most < target.removed - SLACK:
            raise UserError(
                f"{100 * target.removed:g} % of the MACs cannot be removed: with one filter per layer {100 * most:.1f} "
                "% are gone; give a smaller target or more layers."
            )


def keep_best(meter: MacsMeter, scores: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    """Masks (N,) bool, by group: the filters with the highest scores, as many as the target leaves.

    All filters of all groups are ranked together (of equal scores the earlier group's, then the earlier filter); the
    number kept is found by bisection. Every group keeps its best filter.

    Args:
        meter: counts the MACs, of the groups in its order.
        scores: (N,) by group name, comparable between groups.
        target: at least this much goes, and less than one filter's MACs more.

    Raises UserError for a target that one filter per group does not meet.
    """
    ranks = []
    for group in meter.groups:
        score = scores[group.name].double().clone()
        score[score.argmax()] = torch.inf
        ranks.append(score)
    owner = torch.cat([torch.full((len(score),), position) for position, score in enumerate(ranks)])
    order = torch.cat(ranks).argsort(descending=True, stable=True)
    n_kept = _how_many(meter, owner[order], target)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[:n_kept]] = True
    parts = chosen.split([group.n_filters for group in meter.groups])
    return {group.name: part.clone() for group, part in zip(meter.groups, parts, strict=True)}


def _how_many(meter: MacsMeter, owners: Tensor, target: Target) -> int:
    meter.check(target)
    n_groups = len(meter.groups)

    def meets(count: int) -> bool:
        kept = torch.bincount(owners[:count], minlength=n_groups).tolist()
        return meter.removed(kept) >= target.removed - SLACK

    low, high = n_groups, len(owners)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if meets(middle) else (low, middle - 1)
    return low


def spread_evenly(order: Tensor, weight: float = 1.0) -> Tensor:
    """Scores (N,) that keep the same fraction of every layer when ranked together.

    Args:
        order: (N,) the layer's own scores, higher is more important.
        weight: a layer of weight 2 keeps twice the fraction of one of weight 1.
    """
    position = torch.empty(len(order), dtype=torch.float64)
    position[order.argsort(descending=True, stable=True)] = torch.arange(len(order), dtype=torch.float64)
    return -(position + 0.5) / (len(order) * weight)
