"""A Lagrangian reward: one price for a resource, shared by all layers."""

import math
from dataclasses import dataclass

from ..errors import UserError
from .outcome import Outcome, Reward
from .resources import Resource, check_resource, removed_fraction


@dataclass(frozen=True)
class Priced:
    """R = price * removed - drop: what removing is worth, less the accuracy it costs.

    With one price for every layer, each agent spends accuracy where it buys most; bisecting the price
    hits a target for the whole network. Keeping everything scores 0. The Lagrangian of "accuracy under a
    resource limit"; no source, not in the paper.

    Args:
        price: accuracy (a fraction) that removing ALL of the resource would be worth, above 0.
        resource: "macs", "params", "seconds" or "filters".

    Raises:
        UserError: a price that is not above 0, or an unknown resource.
    """

    price: float
    resource: Resource = "macs"

    def __post_init__(self) -> None:
        check_resource(self.resource)
        if not (math.isfinite(self.price) and self.price > 0.0):
            raise UserError(
                f"price is {self.price:g}, but it is accuracy paid for the whole resource: give one above 0"
            )

    def __call__(self, outcome: Outcome) -> Reward:
        """Value one outcome.

        Returns:
            the reward with the terms `drop` and `removed`, both fractions.

        Raises:
            UserError: a price on latency without a measured latency.
        """
        drop = outcome.accuracy_drop
        removed = removed_fraction(outcome, self.resource)
        return Reward(self.price * removed - drop, {"drop": drop, "removed": removed})
