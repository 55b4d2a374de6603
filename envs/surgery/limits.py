"""Limits of a decision: widths in multiples, a least number of filters, filters that must stay.

Shapes: M masks, N filters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...ranges import COUNT, POSITIVE, check_numbers
from .filter_group import FilterGroup, GroupPlan, matching
from .slicing import Rows, width

AUTO = "auto"
PROTECT = (
    "expected numbers of filters by layer, as in",
    'Limits(protect={"conv1": [0, 3]}).',
    "surgery.protect={conv1:[0,3]}.",
)


@dataclass(frozen=True)
class Limits:
    """Limits of every decision; the defaults limit nothing.

    Args:
        round_to: channels of a group's first convolution are kept in multiples of this (8 or 16 suit most hardware),
            the nearest one; the full width is always allowed. "auto": the multiple that a profile of the device
            shows.
        min_kept: least number of filters a group keeps, or, below 1, the least fraction of them.
        protect: name or shell-style pattern of groups -> numbers of filters that always stay; None protects none.
        whole_blocks: whether a residual branch may keep no filter at all, whatever `min_kept` says, so that its whole
            block vanishes (`whole_blocks`).

    A decision keeps its count wherever the limits allow it: a protected filter takes the place of the least important
    kept one. Raises UserError for values that make no sense.
    """

    round_to: int | str = 1
    min_kept: float = 1
    protect: Any = None  # a mapping as above; Any, because a command line cannot add keys to a typed one
    whole_blocks: bool = False

    def __post_init__(self) -> None:
        if self.round_to != AUTO and (not isinstance(self.round_to, int) or self.round_to < 1):
            raise UserError(
                f"surgery.round_to is {self.round_to}; expected a number of channels, 1 or more, or {AUTO} beside a "
                "profile of the device."
            )
        if not self.min_kept > 0 or (self.min_kept > 1 and not float(self.min_kept).is_integer()):
            raise UserError(
                f"surgery.min_kept is {self.min_kept:g}; expected a whole number of filters, or, between 0 and 1, a "
                "fraction of those of a group."
            )
        check_numbers(self, min_kept=POSITIVE)
        if self.round_to != AUTO:
            check_numbers(self, round_to=COUNT)
        if not isinstance(self.protect or {}, Mapping):
            raise UserError(f"surgery.protect is {self.protect!r}; {PROTECT[0]}", *PROTECT[1:])
        for pattern, filters in (self.protect or {}).items():
            if not isinstance(filters, list | tuple) or not all(type(each) is int for each in filters):
                raise UserError(f"surgery.protect has {pattern}: {filters!r}; {PROTECT[0]}", *PROTECT[1:])
            if len(set(filters)) != len(filters):
                raise UserError(f"surgery.protect names a filter of {pattern!r} twice; name each one once.")

    @property
    def none(self) -> bool:
        """Whether nothing is limited."""
        return self.round_to == 1 and self.min_kept == 1 and not self.protect

    def resolved(self, plan: GroupPlan) -> Limits:
        """The same limits with the groups of `plan` by name; UserError for a group or filter that does not exist."""
        by_name = {group.name: group for group in plan.groups}
        found: dict[str, list[int]] = {}
        for pattern, filters in (self.protect or {}).items():
            for name in matching(plan, pattern):
                n_filters = by_name[name].n_filters
                wrong = [index for index in filters if not 0 <= index < n_filters]
                if wrong:
                    raise UserError(
                        f"surgery.protect names filter {wrong[0]} of {name!r}, which has {n_filters} filters; expected "
                        f"numbers from 0 to {n_filters - 1}."
                    )
                found[name] = sorted({*found.get(name, ()), *filters})
        return dataclasses.replace(self, protect=found)

    def renumbered(self, name: str, rows: Rows) -> Limits:
        """The limits of group `name` once only these of its filters are left (numbers in the group as it was)."""
        protected = [place for place, row in enumerate(rows.tolist()) if row in (self.protect or {}).get(name, ())]
        return dataclasses.replace(self, protect={name: protected} if protected else {})

    def counts(self, model: nn.Module, group: FilterGroup) -> list[int]:
        """Every number of filters that `group` (found in `model`) may keep, ascending; N is always the last."""
        n_filters, root = group.n_filters, group.cuts[0]
        least = math.ceil(self.min_kept * n_filters) if self.min_kept < 1 else int(self.min_kept)
        least = max(least, len(self._protected(group)))
        whole, each = width(model.get_submodule(root.module), "out"), root.channels.shape[1]
        assert isinstance(self.round_to, int), "round_to=auto is resolved before anything is decided"
        fitting = [k for k in range(least, n_filters) if (whole - (n_filters - k) * each) % self.round_to == 0]
        none = [0] if group.least == 0 and not self._protected(group) else []
        return [*none, *fitting, n_filters]

    def is_fixed(self, model: nn.Module, group: FilterGroup) -> bool:
        """Whether `group` can lose no filter at all."""
        return self.counts(model, group) == [group.n_filters]

    def _protected(self, group: FilterGroup) -> list[int]:
        return (self.protect or {}).get(group.name, [])

    def apply(self, model: nn.Module, group: FilterGroup, masks_MN: Tensor, scores_N: Tensor) -> Tensor:
        """The masks (M, N) bool with every limit held; one that holds them already is left as it is.

        Args:
            model: the network `group` was found in.
            group: the group; `protect` must know it by name (`resolved`).
            masks_MN: (M, N) bool decisions.
            scores_N: (N,), higher is more important: which filters are restored, and which make room.
        """
        if self.none:
            return masks_MN
        protected = torch.zeros(group.n_filters)
        protected[self._protected(group)] = 1
        counts = torch.tensor(self.counts(model, group))
        # Places 0 to N - 1 by importance, so that a kept filter comes before every dropped one, a protected one first.
        place = scores_N.double().argsort(stable=True).argsort().double() / group.n_filters
        result = torch.zeros_like(masks_MN)
        for row, mask in zip(result, masks_MN, strict=True):
            order = (2 * protected + mask.double() + place).argsort(descending=True, stable=True)
            # The nearest allowed number; of two, the larger.
            away = (counts - mask.sum()).abs()
            row[order[: int(counts[away == away.min()].max())]] = True
        return result


def check_limits(limits: Limits, model: nn.Module, plan: GroupPlan, groups: Iterable[FilterGroup]) -> None:
    """Refuse limits that name what is not there, or under which none of `groups` could lose a filter (UserError)."""
    resolved = limits.resolved(plan)
    chosen = list(groups)
    if chosen and all(resolved.is_fixed(model, group) for group in chosen):
        raise UserError(
            f"Under surgery.round_to={limits.round_to}, min_kept={limits.min_kept:g} and protect no chosen layer can "
            f"lose a filter ({chosen[0].name!r} has {chosen[0].n_filters}); lower them."
        )
