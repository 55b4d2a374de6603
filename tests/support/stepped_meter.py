"""A meter of seconds that rises in steps, as devices do that work in blocks of channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from keepdrop.envs.surgery.filter_group import FilterGroup


@dataclass(frozen=True)
class SteppedMeter:
    """`overhead` seconds, and `per_step` more for every `step` filters that a group keeps, begun ones included."""

    groups: Sequence[FilterGroup]
    step: int = 8
    per_step: float = 1e-3
    overhead: float = 1e-3

    @property
    def whole(self) -> float:
        return self.cost([group.n_filters for group in self.groups])

    def cost(self, kept: Sequence[int]) -> float:
        return self.overhead + self.per_step * sum(ceil(n / self.step) for n in kept)


def clock(step: int = 8, per_step: float = 1e-3):
    """Makes such meters for whatever network, as a profile does."""
    return lambda model, groups: SteppedMeter(tuple(groups), step, per_step)
