"""The reward of "Learning to Prune Filters in Convolutional Neural Networks" (Huang et al., WACV 2018)."""

import math
from dataclasses import dataclass

from ..errors import UserError
from .outcome import Outcome, Reward


@dataclass(frozen=True)
class TryAndLearn:
    """R = psi * phi: accuracy within the drop bound, times the pruning ratio.

    psi = (b - (p* - p)) / b and phi = log(N / kept), with the drop bound b, the base accuracy p* and the
    pruned accuracy p, both fractions (Huang et al., arXiv 1801.07365, section 3). Keeping everything
    scores exactly 0; a drop over b scores below 0.

    Deviation: psi * phi has no lower bound, and one mask at -12 drowns an update. A negative R becomes
    R * floor / (R + floor), which has slope 1 at 0, keeps the order of any two masks and never falls below
    `floor`. A hard cut would score all of a bad start's masks alike and teach nothing. `floor=None` is the paper.

    Args:
        drop_bound: b, the accuracy one may lose, a fraction in (0, 0.5).
        floor: the value negative rewards approach, below 0; None leaves them unbounded.

    Raises:
        UserError: a bound outside its range (with the likely fraction where a percentage came), or a floor
            that is not negative.
    """

    drop_bound: float
    floor: float | None = -1.0

    def __post_init__(self) -> None:
        check_drop_bound(self.drop_bound)
        if self.floor is not None and not (math.isfinite(self.floor) and self.floor < 0.0):
            raise UserError(f"floor is {self.floor}, but it bounds negative rewards: give a number below 0, or None")

    def __call__(self, outcome: Outcome) -> Reward:
        """Value one outcome.

        Returns:
            the reward with the terms `psi` and `phi`, both unbounded.

        Raises:
            ValueError: no filter is kept, where phi is not defined.
        """
        if outcome.n_kept == 0:
            raise ValueError("psi * phi is not defined for a mask that keeps no filter; refuse such masks first")
        psi = (self.drop_bound - outcome.accuracy_drop) / self.drop_bound
        phi = math.log(outcome.n_filters / outcome.n_kept)
        # Without this, a negative psi times phi = 0 would be -0.0.
        value = psi * phi if phi > 0.0 else 0.0
        return Reward(self._bounded(value), {"psi": psi, "phi": phi})

    def _bounded(self, value: float) -> float:
        if self.floor is None or value >= 0.0:
            return value
        return self.floor * (value / (value + self.floor))


def check_drop_bound(drop_bound: float) -> None:
    """Refuse a drop bound outside (0, 0.5).

    Raises:
        UserError: with the likely fraction where a percentage came.
    """
    if 0.5 <= drop_bound <= 100.0:
        raise UserError(
            f"drop_bound is {drop_bound:g}, but it is a fraction of accuracy below 0.5; "
            f"if you mean {drop_bound:g} percent, give {drop_bound / 100:g}"
        )
    if not 0.0 < drop_bound < 0.5:
        raise UserError(f"drop_bound is {drop_bound:g}, but it is a fraction of accuracy: give a number in (0, 0.5)")
