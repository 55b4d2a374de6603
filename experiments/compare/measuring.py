"""How a freshly cut network is trained and measured: the same for every method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ...envs.task import PruningTask
from ..runs.seeds import derive_seed
from ..training.augment import Augment
from ..training.loop import TrainProgress, TrainSettings, fit_network, recalibrate_bn
from .plan import STAGES, Job

TRAINED = STAGES[2:]


@dataclass(frozen=True)
class MeasureSettings:
    """What happens between the cut and the measuring.

    Args:
        bn_images: images of the fit split for the stage "bn".
        train: the full schedule; "one" is the same schedule squeezed into one epoch.
        augment: of the fit images.
    """

    bn_images: int
    train: TrainSettings
    augment: Augment | None

    def schedule(self, stage: str) -> TrainSettings:
        """How the stages "one" and "full" train."""
        return replace(self.train, epochs=min(1.0, self.train.epochs)) if stage == "one" else self.train


def train_to_stage(
    stage: str,
    model: nn.Module,
    task: PruningTask,
    settings: MeasureSettings,
    seed: int,
    *,
    progress: Callable[[TrainProgress], None] | None = None,
    snapshot: Path | None = None,
) -> nn.Module:
    """The freshly cut `model` at a stage: "zero" steps, "bn" recalibrated, after "one" epoch or the "full" schedule.

    Returns a new network except for "zero". Seed, images and schedule are the same for every method.
    """
    if stage == "zero":
        return model
    model = copy.deepcopy(model)
    if stage == "bn":
        recalibrate_bn(model, task.splits.fit, settings.bn_images, derive_seed(seed, "bn"))
        return model
    schedule = settings.schedule(stage)
    fit_network(
        model,
        task.splits.fit,
        schedule,
        seed=derive_seed(seed, "finetune"),
        augment=settings.augment,
        teacher=task.model if schedule.distill_weight > 0 else None,
        progress=progress,
        snapshot=snapshot,
        device=task.device,
    )
    return model.eval()


def result_name(job: Job, stage: str) -> str:
    """Where the result of a job at a stage lies in the run folder."""
    return f"results/{job.key}-{stage}.json"
