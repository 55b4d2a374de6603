"""Cut-off: a ranking of all filters, cut off where every constraint holds, whoever made the ranking.

Shapes: N filters of a group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .filter_group import coupled
from .targets import Constraints


def keep_best(constraints: Constraints, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks (N,) bool, by group: the filters with the highest scores, as many as the constraints leave.

    All filters of all groups are ranked together (of equal scores the earlier group's, then the earlier filter); the
    number kept is found by bisection. Every group keeps its best filter, unless it may keep none (`FilterGroup.least`);
    a branch of which one group keeps none keeps nothing at all. A cost with steps leaves room behind the cut-off: there
    the next filters in the ranking are kept that fit, those first of all that cost nothing.

    Args:
        constraints: hold for the masks, and would not with the next filter.
        scores: (N,) by group name, comparable between groups.

    Raises UserError for a constraint that one filter per group does not meet.
    """
    constraints.check()
    groups, ranks = constraints.groups, []
    for group in groups:
        score = scores[group.name].double().clone()
        if group.least:
            score[score.argmax()] = torch.inf
        ranks.append(score)
    owner = torch.cat([torch.full((len(score),), position) for position, score in enumerate(ranks)])
    order = torch.cat(ranks).argsort(descending=True, stable=True)
    n_kept = _how_many(constraints, owner[order])
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[:n_kept]] = True
    if constraints.is_stepped:
        chosen[order[n_kept + _that_fit(constraints, owner[order], n_kept)]] = True
    parts = chosen.split([group.n_filters for group in groups])
    masks = coupled({group: part.clone() for group, part in zip(groups, parts, strict=True)})
    return {group.name: mask for group, mask in masks.items()}


def _how_many(constraints: Constraints, owners: Tensor) -> int:
    n_groups = len(constraints.groups)

    def meets(count: int) -> bool:
        return constraints.holds(torch.bincount(owners[:count], minlength=n_groups).tolist())

    low, high = sum(group.least for group in constraints.groups), len(owners)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if meets(middle) else (low, middle - 1)
    return low


def _that_fit(constraints: Constraints, owners: Tensor, n_kept: int) -> Tensor:
    """Places behind the cut-off, int64, of the filters that can be kept on top, in the order of the ranking.

    A group whose next filter does not fit is done: costs grow with every filter that is kept elsewhere.
    """
    kept = torch.bincount(owners[:n_kept], minlength=len(constraints.groups)).tolist()
    done: set[int] = set()
    places = []
    for place, owner in enumerate(owners[n_kept:].tolist()):
        if owner in done:
            continue
        kept[owner] += 1
        if constraints.holds(kept):
            places.append(place)
        else:
            kept[owner] -= 1
            done.add(owner)
    return torch.tensor(places, dtype=torch.int64)


def spread_evenly(order: Tensor, weight: float = 1.0) -> Tensor:
    """Scores (N,) that keep the same fraction of every layer when ranked together.

    Args:
        order: (N,) the layer's own scores, higher is more important.
        weight: a layer of weight 2 keeps twice the fraction of one of weight 1.
    """
    position = torch.empty(len(order), dtype=torch.float64)
    position[order.argsort(descending=True, stable=True)] = torch.arange(len(order), dtype=torch.float64)
    return -(position + 0.5) / (len(order) * weight)
