"""Targets of a pruning: how much of which resources may be left, and the constraints that a network makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ...errors import UserError
from ..networks.cost import Cost
from .filter_group import FilterGroup
from .latency_meter import LatencyMeter
from .meters import Clock, MacsMeter, Meter, WeightsMeter, removed

SCOPES = ("groups", "network")
SLACK = 1e-9  # products of fractions differ from whole MACs in the last bits
TIMED = ("latency", "milliseconds")
RESOURCES = ("removed", *TIMED, "params", "bytes")
FRACTIONS = {"latency": "time", "params": "parameters"}


@dataclass(frozen=True)
class Target:
    """What the pruned network may cost; all that is given holds at once, and at least one has to be.

    Args:
        removed: fraction of the MACs to remove, between 0 and 1.
        of: whose: "groups" for those of the layers that make the pruned filters (first convolutions of a residual
            block: only these), "network" for all.
        latency: time that may be left, as a fraction of the dense network's, between 0 and 1.
        milliseconds: time that may be left, of a pass of the batch that was profiled.
        params: parameters that may be left, as a fraction of the dense network's, between 0 and 1.
        bytes: size that the file of the weights may have.

    Raises UserError for a number that makes no sense.
    """

    removed: float | None = None
    of: str = "groups"
    latency: float | None = None
    milliseconds: float | None = None
    params: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.resources:
            raise UserError(f"The target names no resource; expected one or more of {', '.join(RESOURCES)}.")
        if self.removed is not None and not 0 < self.removed < 1:
            raise UserError(
                f"A target of {self.removed:g} was given; expected a fraction between 0 and 1{_hint(self.removed)}"
            )
        for name, what in FRACTIONS.items():
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UserError(
                    f"target.{name} is {value:g}; expected the fraction of the dense network's {what} that may be "
                    f"left, between 0 and 1{_hint(value)}"
                )
        if self.milliseconds is not None and not 0 < self.milliseconds < math.inf:
            raise UserError(f"target.milliseconds is {self.milliseconds:g}; expected a time above 0.")
        if self.bytes is not None and self.bytes < 1:
            raise UserError(f"target.bytes is {self.bytes:,}; expected the size of a file, 1 or more.")
        if self.of not in SCOPES:
            raise UserError(f"targets.of is {self.of!r}; expected one of {', '.join(SCOPES)}.")

    @property
    def resources(self) -> tuple[str, ...]:
        """What is limited."""
        return tuple(name for name in RESOURCES if getattr(self, name) is not None)

    @property
    def is_timed(self) -> bool:
        """Whether a profile of the device is needed."""
        return any(name in TIMED for name in self.resources)

    def facts(self) -> dict[str, Any]:
        """What was asked for, JSON-able; `Target(**facts)` reads it, also as agents were saved before."""
        given = {name: value for name, value in asdict(self).items() if name == "of" or value is not None}
        return given if "removed" in given else {name: value for name, value in given.items() if name != "of"}

    def __str__(self) -> str:
        return ", ".join(f"{name}={getattr(self, name):g}" for name in self.resources)


def _hint(value: float) -> str:
    return f"; did you mean {value / 100:g}?" if 1 <= value < 100 else "."


@dataclass(frozen=True)
class Constraint:
    """One resource of a network and what of it has to go.

    Attributes:
        name: of the resource, as in `Target`.
        asked: what the target said.
        meter: counts it.
        removed: the fraction of the meter's whole that has to go; 0 or less where that is nothing.
    """

    name: str
    asked: float
    meter: Meter
    removed: float

    def holds(self, kept: Sequence[int]) -> bool:
        """Whether enough is gone when the groups keep that many filters."""
        return removed(self.meter, kept) >= self.removed - SLACK

    def exactly(self, kept: Sequence[int]) -> float:
        """The cost of exactly these widths; a time may be above `meter.cost`, which takes the fastest wider ones."""
        return self.meter.seconds(kept) if isinstance(self.meter, LatencyMeter) else self.meter.cost(kept)

    def missing(self, kept: Sequence[int]) -> float:
        """What exactly these widths are short of, a fraction of the whole; 0 or less where the target is met."""
        return self.removed - SLACK - (1.0 - self.exactly(kept) / self.meter.whole)

    def reached(self, kept: Sequence[int]) -> dict[str, Any]:
        """Dense and pruned cost in the meter's unit, JSON-able, beside what was asked for."""
        return {
            "resource": self.name,
            "asked": self.asked,
            "unit": UNITS[self.name],
            "dense": self.meter.whole,
            "pruned": self.exactly(kept),
        }


UNITS = {"removed": "MACs", "latency": "seconds", "milliseconds": "seconds", "params": "parameters", "bytes": "bytes"}


@dataclass(frozen=True)
class Constraints:
    """Everything that a pruned network has to hold at once."""

    each: tuple[Constraint, ...]

    @property
    def groups(self) -> tuple[FilterGroup, ...]:
        """The groups that may be pruned, in the order of their counts."""
        return self.each[0].meter.groups

    @property
    def removed(self) -> float:
        """The largest fraction that has to go of a resource."""
        return max(each.removed for each in self.each)

    @property
    def is_stepped(self) -> bool:
        """Whether a filter more may cost nothing."""
        return any(each.name in TIMED for each in self.each)

    def seconds(self, kept: Sequence[int]) -> float:
        """Time of exactly these widths; 0 where no target is one of time."""
        return max((each.exactly(kept) for each in self.each if each.name in TIMED), default=0.0)

    def missing(self, kept: Sequence[int]) -> float:
        """The most that is missing of a target (`Constraint.missing`)."""
        return max(each.missing(kept) for each in self.each)

    def holds(self, kept: Sequence[int]) -> bool:
        """Whether all hold when the groups keep that many filters."""
        return all(each.holds(kept) for each in self.each)

    def eased(self, part: int, of: int) -> Constraints:
        """The same resources, of which only `part` / `of` has to go."""
        return self._with(lambda each: each.removed * part / of)

    def tightened(self, kept: Sequence[int], step: float) -> Constraints:
        """Those that these counts miss ask for `step` more."""
        return self._with(lambda each: each.removed + (0.0 if each.missing(kept) <= 0 else step))

    def _with(self, removed_of: Callable[[Constraint], float]) -> Constraints:
        return Constraints(tuple(replace(each, removed=removed_of(each)) for each in self.each))

    def saved(self, kept: Sequence[int], position: int) -> list[float]:
        """What giving up 1, 2, ... of the filters that a group still has saves, as far as it may go.

        In the meter's unit, or as a share of what has to go of several. Costs without steps are taken as linear.
        """
        fewest = self.groups[position].least
        if len(self.each) == 1:
            return _saved(self.each[0], kept, position, fewest)
        asking = [each for each in self.each if each.removed > 0]
        scales = [each.meter.whole * each.removed for each in asking]
        saved = [_saved(each, kept, position, fewest) for each in asking]
        return [sum(one / scale for one, scale in zip(row, scales, strict=True)) for row in zip(*saved, strict=True)]

    def reached(self, kept: Sequence[int]) -> list[dict[str, Any]]:
        """For every resource what was asked for, and its cost before and after."""
        return [each.reached(kept) for each in self.each]

    def check(self, least: Sequence[int] | None = None) -> None:
        """UserError for a resource of which too much is left even with the fewest filters.

        Args:
            least: filters that each group keeps at least; None: one, or none where a block may vanish.
        """
        if all(each.removed <= 0 for each in self.each):
            raise UserError(f"{_names(self.each)} would remove nothing: {_already(self.each[0])}; ask for less.")
        fewest = list(least or [group.least for group in self.groups])
        for each in self.each:
            if not each.holds(fewest):
                raise UserError(_unmet(each, fewest))


def _names(each: Sequence[Constraint]) -> str:
    return " and ".join(f"target.{one.name}={one.asked:g}" for one in each)


def _already(each: Constraint) -> str:
    return f"the dense network has {amount(each.meter.whole, UNITS[each.name])}"


def _unmet(each: Constraint, fewest: Sequence[int]) -> str:
    most, how = removed(each.meter, fewest), "with one filter per layer"
    if not all(fewest):
        how = "with one filter per layer and whole blocks gone"
    if any(count > 1 for count in fewest):
        how = "under surgery.round_to, min_kept and protect"
    if each.name == "removed":
        return (
            f"{100 * each.asked:g} % of the MACs cannot be removed: {how} {100 * most:.1f} % are gone; give a smaller "
            "target or more layers."
        )
    left, whole = (amount(value, UNITS[each.name]) for value in (each.meter.cost(fewest), each.meter.whole))
    return (
        f"target.{each.name}={each.asked:g} cannot be met: {how} {left.split()[0]} of {whole} "
        f"({100 * (1 - most):.1f} %) are left; give a larger one or more layers."
    )


def amount(value: float, unit: str) -> str:
    """A cost for a person: "3.21 ms", "12,345 parameters"."""
    return f"{1e3 * value:.3g} ms" if unit == "seconds" else f"{value:,.0f} {unit}"


def _saved(each: Constraint, kept: Sequence[int], position: int, fewest: int) -> list[float]:
    now = each.meter.cost(kept)

    def left(fewer: int) -> float:
        return each.meter.cost([n - fewer * (i == position) for i, n in enumerate(kept)])

    steps = range(1, kept[position] - fewest + 1)
    if each.name in TIMED:
        return [now - left(fewer) for fewer in steps]
    per_filter = now - left(1) if steps else 0.0
    return [per_filter * fewer for fewer in steps]


def constraints_of(
    target: Target, model: nn.Module, cost: Cost, groups: Sequence[FilterGroup], clock: Clock | None = None
) -> Constraints:
    """What a target means for a network.

    Args:
        target: what the network may cost.
        model: the network the groups were found in.
        cost: its `count_cost`.
        groups: the groups that may be pruned.
        clock: makes the meter of seconds; needed for a target of time.

    Raises UserError for a target of time without a clock.
    """
    if target.is_timed and clock is None:
        raise UserError(f"target.{target.resources[0]} needs the times of this device; give a profile of it.")
    seconds = clock(model, groups) if target.is_timed and clock is not None else None
    made = []
    for name in target.resources:
        asked = float(getattr(target, name))
        if name == "removed":
            made.append(Constraint(name, asked, MacsMeter(model, cost, groups, target.of), asked))
        elif name in TIMED:
            assert seconds is not None
            made.append(Constraint(name, asked, seconds, _to_remove(name, asked, seconds.whole)))
        else:
            meter = WeightsMeter(model, groups, "params" if name == "params" else "bytes")
            made.append(Constraint(name, asked, meter, _to_remove(name, asked, meter.whole)))
    return Constraints(tuple(made))


def _to_remove(name: str, asked: float, whole: float) -> float:
    left: Mapping[str, float] = {"milliseconds": asked / 1e3 / whole, "bytes": asked / whole}
    return 1.0 - left.get(name, asked)
