"""Recovery between layers: batch-norm recalibration and a short fine-tuning, kept only where they help."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ...atomic import write_atomically
from ...envs.networks.copying import copied
from ...envs.task import PruningTask, replace_model
from ...errors import UserError
from ...ranges import IMAGES_OR_NONE, check_numbers
from ..runs.folder import read_json
from ..runs.seeds import derive_seed
from ..training.augment import Augment
from ..training.loop import DivergedError, FitOptions, TrainProgress, TrainSettings, fit_network, recalibrate_bn
from ..training.rate import bearable_rate, lowered

USED = "recovery.json"  # in a layer's folder: the rate that helped, or null

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

    Where no learning rate was given, the one that helped after the layer before is taken again, else one is chosen
    (`bearable_rate`). If the network ends worse, there is one more attempt at a tenth of it.

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
        recalibrated = self._recalibrated(task.model, task, seed)
        helped = recalibrated is not task.model and _accuracy(recalibrated, task) >= _accuracy(task.model, task)
        best = recalibrated if helped else task.model
        return best if self.settings.train.epochs <= 0 else self._trained(best, task, seed, working)

    def _recalibrated(self, model: nn.Module, task: PruningTask, seed: int) -> nn.Module:
        if self.settings.bn_images < 1:
            return model
        model = copied(model)
        recalibrate_bn(model, task.splits.fit, self.settings.bn_images, derive_seed(seed, "bn"))
        return model

    def _trained(self, model: nn.Module, task: PruningTask, seed: int, working: Path) -> nn.Module:
        chosen, before = self.settings.train, _accuracy(model, task)
        options: FitOptions = {
            "seed": derive_seed(seed, "train"),
            "augment": self.augment,
            "teacher": self.teacher,
            "device": task.device,
        }
        lr = chosen.lr
        if lr is None:
            lr = _rate_before(working) or bearable_rate(model, task.splits.fit, chosen, **options)
        for rate in (lr, lowered(lr))[: 2 if chosen.lr is None else 1]:
            trained = self._trained_at(rate, model, task, options)
            if trained is not None and _accuracy(trained, task) >= before:
                self._note(working, rate)
                return trained
        self._note(working, None)
        return model

    def _note(self, working: Path, rate: float | None) -> None:
        if self.settings.train.lr is None:
            write_atomically(working / USED, json.dumps({"lr": rate}) + "\n")

    def _trained_at(self, lr: float, model: nn.Module, task: PruningTask, options: FitOptions) -> nn.Module | None:
        """A trained copy; None if training diverged, which is judged like any recovery that makes it worse."""
        trained = copied(model)
        try:
            chosen = replace(self.settings.train, lr=lr)
            fit_network(trained, task.splits.fit, chosen, **options, progress=self.progress)
        except DivergedError:
            return None
        return trained


def _accuracy(model: nn.Module, task: PruningTask) -> float:
    """On the reward split; the task measures its own network once."""
    return (task if model is task.model else replace_model(task, model)).accuracy


def _rate_before(working: Path) -> float | None:
    """The rate that helped after the last layer recovered; None if none did, or there is no such layer.

    It is read from that layer's folder, so that a resumed run takes the same one.
    """
    layers = sorted(each.parent for each in working.parent.glob(f"*/{USED}"))
    done = [layer for layer in layers if layer != working and not layer.name.endswith(".partial")]
    if not done:
        return None
    file = done[-1] / USED
    lr = read_json(file, dict, "an object").get("lr")
    if lr is not None and not (isinstance(lr, int | float) and 0 <= lr < math.inf):
        raise UserError(f"{str(file)!r} is damaged (no learning rate); put back the file that the run wrote.")
    return lr
