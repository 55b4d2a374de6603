"""Dense baseline: the network before any pruning, measured once, and refused if it only guesses.

Shapes: B images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..data.objective import TOP1, Objective
from ..data.splits import Splits
from ..networks.cost import Cost, count_cost
from .mask_evaluator import correct_flags


@dataclass(frozen=True)
class DenseBaseline:
    """The network before any pruning: measured once, never again.

    `correct` (B,) holds what it got right on the reward split, image by image, or its points under another metric than
    top-1, so that the base accuracy of any subset of these images is exact and free.
    """

    correct: Tensor
    cost: Cost
    objective: Objective = TOP1

    @property
    def accuracy(self) -> float:
        """Fraction in [0, 1] on the whole reward split."""
        return self.objective.fraction(self.correct)


def measure_baseline(model: nn.Module, splits: Splits, device: torch.device | str = "cpu") -> DenseBaseline:
    """Measure the dense network on the reward split; a network that guesses is refused with a `UserError`."""
    images, labels = (value.to(device) for value in splits.reward.batch(torch.arange(len(splits.reward))))
    objective = splits.objective
    base = DenseBaseline(
        correct_flags(model, images, labels, objective=objective).cpu(), count_cost(model, images[:1]), objective
    )
    if objective.is_top1:
        _refuse_chance(base, labels.cpu())
    else:
        _refuse_guessing(base, correct_flags(model, images, labels.roll(1, 0), objective=objective))
    return base


def _refuse_chance(base: DenseBaseline, labels: Tensor) -> None:
    chance = float(torch.bincount(labels).max()) / len(labels)
    margin = 3 * (chance * (1 - chance) / len(labels)) ** 0.5
    if base.accuracy <= chance + margin:
        raise UserError(
            f"The base network's accuracy on the {len(labels)} reward images is {base.accuracy:.4f}, which is chance "
            f"level (the most frequent class gives {chance:.4f}); expected a trained network: check the checkpoint, "
            "the normalisation (mean and std) and the order of the classes."
        )


def _refuse_guessing(base: DenseBaseline, elsewhere: Tensor) -> None:
    """Refuse a network whose answers fit other images' targets, `elsewhere` (B,) in points, as well as their own."""
    gain = (base.correct.double() - elsewhere.double()) / base.objective.unit
    # No difference at all: targets that are all alike, or a metric that does not look at them.
    guesses = bool(gain.any()) and float(gain.mean()) <= 3 * float(gain.std(correction=0)) / len(gain) ** 0.5
    if guesses or base.accuracy == 0:
        raise UserError(
            f"The base network's {base.objective.name} on the {len(gain)} reward images is {base.accuracy:.4f}, and "
            f"{base.objective.fraction(elsewhere):.4f} against other images' targets, which is guessing; expected a "
            "trained network: check the checkpoint, the normalisation (mean and std) and the targets."
        )
