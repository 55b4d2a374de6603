"""The dense network before any pruning: measured once, and refused if it knows nothing.

Shapes: B images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..rewards.errors import UserError
from .cost import Cost, count_cost
from .evaluate import correct_flags
from .splits import Splits


@dataclass(frozen=True)
class Base:
    """The network before any pruning: measured once, never again.

    `correct` (B,) bool says image by image what it got right on the reward split, so that the base accuracy of any
    subset of these images is exact and free.
    """

    correct: Tensor
    cost: Cost

    @property
    def accuracy(self) -> float:
        """Fraction in [0, 1] on the whole reward split."""
        return int(self.correct.sum()) / len(self.correct)


def measure_base(model: nn.Module, splits: Splits, device: torch.device | str = "cpu") -> Base:
    """Measure the dense network on the reward split; a network that guesses is refused with a `UserError`."""
    images, labels = splits.reward.batch(torch.arange(len(splits.reward)))
    correct = correct_flags(model, images.to(device), labels.to(device)).cpu()
    base = Base(correct, count_cost(model, images[:1].to(device)))
    chance = float(torch.bincount(labels).max()) / len(labels)
    margin = 3 * (chance * (1 - chance) / len(labels)) ** 0.5
    if base.accuracy <= chance + margin:
        raise UserError(
            f"The base network's accuracy on the {len(labels)} reward images is {base.accuracy:.4f}, which is chance "
            f"level (the most frequent class gives {chance:.4f}); expected a trained network: check the checkpoint, "
            "the normalisation (mean and std) and the order of the classes."
        )
    return base
