"""A reward that aims at a budget: the highest accuracy with a given fraction of a resource removed."""

import math
from dataclasses import dataclass

from ..errors import UserError
from .outcome import Outcome, Reward
from .resources import Resource, check_resource, removed_fraction
from .try_and_learn import check_drop_bound


@dataclass(frozen=True)
class Budget:
    """R = p / p* - weight * shortfall - weight * excess: accuracy kept, less what is missing of the target.

    shortfall = max(0, target - removed) / target is 0 once the target is met, so that removing more gains
    nothing beyond what accuracy says, and 1 for a network nothing was removed from. It is linear (an exact
    penalty: with a large enough weight the optimum lies at the target, where a quadratic one stops short)
    and continuous, so a mask near the target scores near it. With a weight above 1, any mask that meets the
    target scores above keep-all, whatever its accuracy. excess = max(0, drop - drop_bound) / p*, where a
    bound is given: the accuracy that may be lost cheaply. No source; not in the paper.

    Args:
        target: the fraction of the resource to remove, in (0, 1).
        resource: "macs", "params", "seconds" or "filters".
        drop_bound: an accuracy drop beyond which a lost point costs 1 + weight instead of 1, a fraction
            in (0, 0.5); None: every point costs the same.
        weight: price of missing the target altogether, in units of the base accuracy; above 1.

    Raises:
        UserError: an argument outside its range.
    """

    target: float
    resource: Resource = "macs"
    drop_bound: float | None = None
    weight: float = 3.0

    def __post_init__(self) -> None:
        check_resource(self.resource)
        if 1.0 <= self.target <= 100.0:
            hint = f"if you mean {self.target:g} percent, give {self.target / 100:g}"
            raise UserError(f"target is {self.target:g}, but it is the fraction to remove, in (0, 1); {hint}")
        if not 0.0 < self.target < 1.0:
            raise UserError(f"target is {self.target:g}, but it is the fraction to remove: give a number in (0, 1)")
        if not (math.isfinite(self.weight) and self.weight > 1.0):
            raise UserError(f"weight is {self.weight:g}, but keep-all only scores badly enough with a weight above 1")
        if self.drop_bound is not None:
            check_drop_bound(self.drop_bound)

    def __call__(self, outcome: Outcome) -> Reward:
        """Value one outcome.

        Returns:
            the reward with the terms `accuracy_kept` (p / p*), `removed`, `shortfall` and `excess`.

        Raises:
            ValueError: a base accuracy of 0.
            UserError: a latency target without a measured latency.
        """
        if outcome.base_accuracy <= 0.0:
            raise ValueError("a budget measures accuracy against the base, and the base accuracy is 0")
        kept = outcome.pruned_accuracy / outcome.base_accuracy
        removed = removed_fraction(outcome, self.resource)
        shortfall = max(0.0, self.target - removed) / self.target
        bound = math.inf if self.drop_bound is None else self.drop_bound
        excess = max(0.0, outcome.accuracy_drop - bound) / outcome.base_accuracy
        value = kept - self.weight * (shortfall + excess)
        return Reward(value, {"accuracy_kept": kept, "removed": removed, "shortfall": shortfall, "excess": excess})
