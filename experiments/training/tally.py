"""Loss and score of an epoch, kept on the device until somebody looks: a GPU is not waited for after every step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...envs.data.objective import Objective
from .devices import Team

WAITING = 2**28  # bytes of outputs that may wait to be scored


class Tally:
    """What the steps of an epoch add up to.

    Args:
        objective: scores outputs.
        patience: steps after which it looks at what they brought; 1: after each.
    """

    def __init__(self, objective: Objective, patience: int) -> None:
        self.objective, self.patience = objective, patience
        self.losses: list[float] = []
        self.points: list[Tensor] = []
        self._totals: list[Tensor] = []
        self._answers: list[tuple[Tensor, Tensor]] = []
        self._bytes = 0

    def add(self, total: Tensor, outputs: Tensor, targets: Tensor, sharing: Team | None = None) -> float | None:
        """The loss () summed over a step's images, and outputs (B, ...) for targets; a loss that is not finite, if any.

        Right and wrong answers are counted at once, which asks nothing of the device; other metrics look at values.
        """
        total = total if sharing is None else sharing.gathered(total[None]).sum()
        waits = self.patience > 1
        self._totals.append(total.clone() if waits else total)
        if waits and self.objective.is_top1:
            self.points.append(self.objective.points(outputs, targets))
        else:
            self._answers.append((outputs.clone(), targets) if waits else (outputs, targets))
            self._bytes += outputs.numel() * outputs.element_size()
        late = len(self._totals) >= self.patience or self._bytes > WAITING
        return self.look(sharing) if late else None

    def look(self, sharing: Team | None = None) -> float | None:
        """Wait for the device; the first loss that is not finite, if any, else None."""
        found = torch.stack(self._totals).tolist() if self._totals else []
        self.losses += found
        self._totals = []
        odd = [each for each in found if not math.isfinite(each)]
        if odd:  # before the metric meets what is no number
            return float(odd[0])
        for outputs, targets in self._answers:
            points = self.objective.points(outputs, targets)
            self.points.append((points if sharing is None else sharing.gathered(points)).cpu())
        self._answers, self._bytes = [], 0
        return None

    @property
    def loss(self) -> float:
        """Summed over all images that were looked at."""
        return sum(self.losses)

    def all_points(self) -> Tensor:
        """Of every image, (n, ...), on the CPU."""
        return torch.cat(self.points).cpu()
