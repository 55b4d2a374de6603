"""What is done for each job of a comparison: choose masks, cut, train and measure, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from ...envs.evaluation.mask_evaluator import accuracy_on
from ...envs.networks.copying import copied
from ...envs.task import PruningTask
from ..config.build import build_augment
from ..config.entry_point import settings
from ..runs.folder import RunFolder
from ..runs.seeds import derive_seed
from ..training.augment import Augment
from ..training.loop import TrainProgress, TrainSettings, fit_network, recalibrate_bn
from ..training.rate import bearable_rate
from .choices import Choices
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

    @classmethod
    def of(cls, config: DictConfig) -> MeasureSettings:
        """Those of a root configuration."""
        return cls(config.bn_images, settings(config.finetune, TrainSettings), build_augment(config.augment))

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
    model = copied(model)
    if stage == "bn":
        recalibrate_bn(model, task.splits.fit, settings.bn_images, derive_seed(seed, "bn"))
        return model
    schedule, fit = settings.schedule(stage), task.splits.fit
    shared: dict[str, Any] = {
        "seed": derive_seed(seed, "finetune"),
        "augment": settings.augment,
        "teacher": task.model if schedule.distill_weight > 0 else None,
        "device": task.device,
    }
    schedule = replace(schedule, lr=bearable_rate(model, fit, schedule, **shared))
    fit_network(model, fit, schedule, **shared, progress=progress, snapshot=snapshot)
    return model.eval()


def choose(choices: Choices, job: Job) -> None:
    """Choose for one job, unless that was done before."""
    choices.report(0.0, job.label)
    choices.record(job)


def measure(choices: Choices, job: Job, stages: Sequence[str]) -> None:
    """Cut what was chosen for one job, once, and measure it at all stages that have no result yet."""
    folder, measuring = choices.folder, MeasureSettings.of(choices.config)
    evaluation = choices.task_of(job)
    model = evaluation.cut(evaluation.joined(choices.masks(choices.record(job))))

    def show(progress: TrainProgress) -> None:
        choices.report(progress.step / progress.n_steps, f"{job.label}, loss {progress.loss:.3f}")

    choices.report(0.0, job.label)
    for stage in unmeasured(folder, job, stages):
        snapshot = (folder / result_name(job, stage)).with_suffix(".snapshot")
        reached = train_to_stage(stage, model, evaluation.task, measuring, job.seed, progress=show, snapshot=snapshot)
        splits = evaluation.task.splits
        result = {f"{role}_accuracy": accuracy_on(reached, getattr(splits, role)) for role in ("reward", "report")}
        folder.write_json(result_name(job, stage), result)
        snapshot.unlink(missing_ok=True)


def unmeasured(folder: RunFolder, job: Job, stages: Sequence[str]) -> list[str]:
    """The stages at which a job has no result yet."""
    return [stage for stage in stages if not (folder / result_name(job, stage)).is_file()]


def result_name(job: Job, stage: str) -> str:
    """Where the result of a job at a stage lies in the run folder."""
    return f"results/{job.key}-{stage}.json"
