"""Learning rate that a trained network bears: short trials on copies, from the highest rate down by tenths."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from ...envs.data.images import LabelledImages
from ...envs.data.objective import objective_of, output_of
from ...envs.networks.copying import copied
from ...envs.networks.modes import evaluating
from .augment import Augment
from .loop import DivergedError, fit_network, steps_of
from .train_settings import TrainSettings

FEWEST, MOST = 20, 40  # steps of a trial; in between a twentieth of the training
TENTHS = 7  # that a rate is lowered by at most
PROBED = 256  # fit images on which a trial is judged


def bearable_rate(
    model: nn.Module,
    data: LabelledImages,
    settings: TrainSettings,
    *,
    seed: int,
    augment: Augment | None = None,
    teacher: nn.Module | None = None,
    device: torch.device | str | None = None,
) -> float:
    """`settings.lr`, or where that is None `top_lr`, lowered by tenths to what `model` (untouched) bears.

    A trial is the same training squeezed into 20 to 40 steps; it is judged by the loss on 256 fit images. A network
    with normalisation layers takes big steps and comes back, so only a rate at which it diverges, or loses more than
    half of its score, is lowered. Without them it is lowered until it ends no worse than it began, and no worse than a
    tenth of it. Same seed, same rate; with fewer steps in all than two trials take, none is made.
    """
    n_steps = steps_of(data, settings)
    if settings.lr is not None or n_steps < 2 * FEWEST:
        return settings.rate
    steps = min(MOST, max(FEWEST, n_steps // 20))
    trial = _Trial(model, data, settings, steps * settings.epochs / n_steps, seed, augment, teacher, device)
    return trial.lowest() if not _has_normalisation(model) else trial.first_that_holds()


class _Trial:
    """One training, squeezed into a few steps at several rates."""

    def __init__(
        self,
        model: nn.Module,
        data: LabelledImages,
        settings: TrainSettings,
        epochs: float,
        seed: int,
        augment: Augment | None,
        teacher: nn.Module | None,
        device: torch.device | str | None,
    ) -> None:
        self.model, self.data, self.settings, self.epochs = model, data, settings, epochs
        self.seed, self.augment, self.teacher, self.device = seed, augment, teacher, device
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        self.probed = order[:PROBED]

    def lowest(self) -> float:
        """The highest rate that ends no worse than it began, and no worse than a tenth of it."""
        before, rates = self._judged(self.model)[0], self._rates()
        higher = self._ended(rates[0])[0]
        for rate, tenth in pairwise(rates):
            lower = self._ended(tenth)[0]
            if higher <= min(before, lower):
                return rate
            higher = lower
        return rates[-1]

    def first_that_holds(self) -> float:
        """The highest rate after which at least half of the score is left."""
        _, before = self._judged(self.model)
        held = (rate for rate in self._rates() if self._ended(rate)[1] >= before / 2)
        return next(held, self._rates()[-1])

    def _rates(self) -> list[float]:
        return [float(f"{self.settings.rate / 10**tenth:.9g}") for tenth in range(TENTHS + 1)]

    def _ended(self, rate: float) -> tuple[float, float]:
        model = copied(self.model)
        try:
            fit_network(
                model,
                self.data,
                replace(self.settings, lr=rate, epochs=self.epochs),
                seed=self.seed,
                augment=self.augment,
                teacher=self.teacher,
                device=self.device,
            )
        except DivergedError:
            return math.inf, -math.inf
        return self._judged(model)

    @torch.no_grad()
    def _judged(self, model: nn.Module) -> tuple[float, float]:
        """The loss in training, in evaluation mode, and the score; infinite and none where they are not finite."""
        objective, chosen = objective_of(self.data), self.settings
        device = next(model.parameters()).device
        images, targets = (value.to(device) for value in self.data.batch(self.probed))
        with evaluating(model, self.teacher):
            outputs = output_of(model(images)).float()
            loss = objective.mean_loss(outputs, targets, chosen.label_smoothing)
            if self.teacher is not None and chosen.distill_weight > 0:
                dense = self.teacher(images)
                loss = objective.distilled(loss, outputs, dense, targets, chosen.distill_weight, chosen.temperature)
        if not math.isfinite(float(loss)):
            return math.inf, -math.inf
        return float(loss), objective.fraction(objective.points(outputs, targets))


def _has_normalisation(model: nn.Module) -> bool:
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    return any(isinstance(module, kinds) for module in nn.Module.modules(model))
