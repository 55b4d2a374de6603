"""Learning rate of a fine-tuning that was given none: what its steps can use, lowered to what the network bears."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn

from ...envs.data.images import LabelledImages
from ...envs.data.objective import objective_of, output_of
from ...envs.networks.copying import copied
from ...envs.networks.memory_layout import suited
from ...envs.networks.modes import evaluating
from .loop import DivergedError, FitOptions, fit_network, steps_of
from .train_settings import TrainSettings

ENOUGH = 5000  # steps from which on a training can use all of `top_lr`
TENTHS = 7  # that a rate is lowered by at most
TRIED = 4  # rates at most: the highest, and three to find the right one among seven tenths
SHARE = 20  # a trial costs a twentieth of the training at most, in images that pass forward
FEWEST, MOST = 16, 256  # fit images on which a rate is judged
BEARABLE = 2.0  # times the loss that one step may lead to


def usable_rate(data: LabelledImages, settings: TrainSettings) -> float:
    """`settings.lr`, or where that is None `top_lr` times the root of the share of 5,000 steps that there are.

    A trained network that takes big steps loses at first, and a short training ends before it has won that back. Over
    few steps it goes about as far as the root of their number times the rate.
    """
    if settings.lr is not None:
        return settings.rate
    return float(f"{settings.rate * min(1.0, steps_of(data, settings) / ENOUGH) ** 0.5:.2g}")


def bearable_rate(
    model: nn.Module, data: LabelledImages, settings: TrainSettings, **options: Unpack[FitOptions]
) -> float:
    """`usable_rate`, lowered by tenths to what `model` (untouched) bears, where no rate was given.

    One step of the training is taken, and its direction followed for as far as each rate leads, judged by up to 256
    fit images: without normalisation layers the loss may double on the way that momentum makes of one gradient. A
    network with them comes back from that, so only a rate is lowered at which the step itself, without momentum, costs
    half of the score. At most four rates are tried; all of it costs less than 5 % of the training, and where that is
    not enough for 16 images (below some 30 steps of 64), no trial is made. Same seed, same rate.
    """
    rate, passes = usable_rate(data, settings), 3 * settings.batch_size  # a step: forward, and backward twice as long
    n_images = int(passes * (steps_of(data, settings) / SHARE - 1) / (TRIED + 1))
    if settings.lr is not None or min(n_images, len(data)) < FEWEST or rate == 0:
        return rate
    rates = [rate, *(lowered(rate, tenth) for tenth in range(1, TENTHS + 1))]
    one = replace(settings, lr=rate, momentum=0.0, schedule="constant", warmup=0.0, ema=None, devices=1)
    one = replace(one, epochs=settings.epochs / steps_of(data, settings))
    stepped = copied(model)
    try:
        fit_network(stepped, data, one, **options)
    except DivergedError:
        return rates[-1]
    trial = _Trial(model, stepped, data, settings, min(n_images, MOST), options["seed"], options.get("teacher"))
    return trial.highest(rates)


def lowered(rate: float, tenths: int = 1) -> float:
    """A rate lowered by tenths, without the digits that floats add: 0.02, 0.002, 0.0002."""
    return float(f"{rate / 10**tenths:.9g}")


class _Trial:
    """One step, from `model` to `stepped` at the first of the rates, followed for as far as the others lead."""

    def __init__(
        self,
        model: nn.Module,
        stepped: nn.Module,
        data: LabelledImages,
        settings: TrainSettings,
        n_images: int,
        seed: int,
        teacher: nn.Module | None,
    ) -> None:
        self.settings, self.objective = settings, objective_of(data)
        device = next(stepped.parameters()).device
        # Of its own, because the step has moved statistics that tell nothing of the rate.
        self.model = copied(model).to(device)
        self.begun = {name: each.detach().clone() for name, each in self.model.named_parameters()}
        self.ended = {name: each.detach() for name, each in stepped.named_parameters()}
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        images, self.targets = (value.to(device) for value in data.batch(order[:n_images]))
        self.teacher = teacher if settings.distill_weight > 0 else None
        self.images = suited(self.model, images if self.teacher is None else suited(self.teacher, images))
        self.dense = self._taught()

    def highest(self, rates: list[float]) -> float:
        """The highest of the rates (falling by tenths) that is borne, found in halves; the last one is not tried."""
        loss, score = self._judged(0.0)
        normalised = _has_normalisation(self.model)
        length = 1.0 if normalised else 1 / (1 - min(self.settings.momentum, 0.99))

        def borne(tenth: int) -> bool:
            now, left = self._judged(length / 10**tenth)
            return left >= score / 2 if normalised else now <= BEARABLE * loss

        if borne(0):
            return rates[0]
        low, high = 1, len(rates) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if borne(middle) else (middle + 1, high)
        return rates[low]

    def _judged(self, length: float) -> tuple[float, float]:
        """The loss in training and the score, `length` times the step from where it began; infinite and none if so."""
        self._move(length)
        with evaluating(self.model), torch.no_grad():
            outputs = output_of(self.model(self.images)).float()
            loss = self.objective.mean_loss(outputs, self.targets, self.settings.label_smoothing)
            if self.dense is not None:
                weight, temperature = self.settings.distill_weight, self.settings.temperature
                loss = self.objective.distilled(loss, outputs, self.dense, self.targets, weight, temperature)
        if not math.isfinite(float(loss)):
            return math.inf, -math.inf
        return float(loss), self.objective.fraction(self.objective.points(outputs, self.targets))

    @torch.no_grad()
    def _move(self, length: float) -> None:
        for name, each in self.model.named_parameters():
            began = self.begun[name]
            each.copy_(began + length * (self.ended[name] - began) if length else began)

    @torch.no_grad()
    def _taught(self) -> Tensor | None:
        if self.teacher is None:
            return None
        with evaluating(self.teacher):
            return self.teacher(self.images)


def _has_normalisation(model: nn.Module) -> bool:
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    return any(isinstance(module, kinds) for module in nn.Module.modules(model))
