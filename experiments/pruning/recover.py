"""Recovery between layers: batch-norm recalibration and a short fine-tuning, kept only where they help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ...envs.networks.copying import copied
from ...envs.task import PruningTask, replace_model
from ...ranges import IMAGES_OR_NONE, check_numbers
from ..runs.seeds import derive_seed
from ..training.augment import Augment
from ..training.loop import DivergedError, TrainProgress, TrainSettings, fit_network, recalibrate_bn
from ..training.rate import bearable_rate

TRAIN = TrainSettings(epochs=2, batch_size=64, top_lr=0.02, distill_weight=0.5)


@dataclass(frozen=True)
class RecoverySettings:
    """What follows a cut.

    Args:
        bn_images: images of the fit split on which batch normalisation is measured anew; 0 leaves it.
        train: a short fine-tuning; 0 epochs leaves it out.
    """

    bn_images: int = 0
    train: TrainSettings = TRAIN

    def __post_init__(self) -> None:
        check_numbers(self, bn_images=IMAGES_OR_NONE)


class Recover:
    """Recover a freshly cut network; the result is judged on the reward split and dropped if it is worse.

    Args:
        settings: what to do.
        teacher: the dense network, for distillation (`settings.train.distill_weight`).
        augment: of the fit images.
        progress: told about every epoch of the fine-tuning.
    """

    def __init__(
        self,
        settings: RecoverySettings,
        teacher: nn.Module | None = None,
        augment: Augment | None = None,
        progress: Callable[[TrainProgress], None] | None = None,
    ) -> None:
        self.settings = settings
        self.teacher = teacher
        self.augment = augment
        self.progress = progress

    def __call__(self, task: PruningTask, seed: int, working: Path) -> nn.Module:
        """The better of the network as it is and the recovered one."""
        best = task.model
        for step in (self._recalibrated, self._trained):
            candidate = step(best, task, seed)
            if candidate is not best and replace_model(task, candidate).accuracy >= replace_model(task, best).accuracy:
                best = candidate
        return best

    def _recalibrated(self, model: nn.Module, task: PruningTask, seed: int) -> nn.Module:
        if self.settings.bn_images < 1:
            return model
        model = copied(model)
        recalibrate_bn(model, task.splits.fit, self.settings.bn_images, derive_seed(seed, "bn"))
        return model

    def _trained(self, model: nn.Module, task: PruningTask, seed: int) -> nn.Module:
        if self.settings.train.epochs <= 0:
            return model
        trained, fit, chosen = copied(model), task.splits.fit, self.settings.train
        shared: dict[str, Any] = {
            "seed": derive_seed(seed, "train"),
            "augment": self.augment,
            "teacher": self.teacher,
            "device": task.device,
        }
        try:
            chosen = replace(chosen, lr=bearable_rate(model, fit, chosen, **shared))
            fit_network(trained, fit, chosen, **shared, progress=self.progress)
        except DivergedError:  # judged like any other recovery that makes it worse
            return model
        return trained
