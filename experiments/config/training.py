"""Training in a run: the dense baseline, recovery after a cut, fine-tuning; each shown, recorded and resumable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...envs.data.objective import display_name
from ...envs.data.splits import Splits
from ...envs.networks.checkpoint import load_checkpoint, save_weights
from ...envs.networks.copying import copied
from ...envs.task import PruningTask
from ...errors import UserError
from ..deploy.clock import keep_profile
from ..pruning.input_checks import resolve_device
from ..pruning.recover import Recover, RecoverySettings
from ..pruning.schedule import Recovery
from ..runs.context import RunContext
from ..runs.folder import RunFolder
from ..runs.provenance import keep_provenance
from ..runs.seeds import derive_seed
from ..training.guarded import BaseTraining, fine_tune, snapshots_of, train_base
from ..training.loop import TrainProgress, TrainSettings
from .build import Constructor, build_augment, load_network
from .entry_point import settings
from .prepare import Inputs

WEIGHTS = "model.safetensors"
JUDGED = "judged.json"


def begin_task(inputs: Inputs, context: RunContext) -> PruningTask:
    """The task on the dense network, which is trained first where there is no checkpoint; its provenance is kept."""
    dense = inputs.dense
    if dense is None:
        dense = dense_baseline(inputs.construct, inputs.splits, context).to(inputs.device)
    for note in inputs.construct.notes:
        context.terminal.say(note)
    task = inputs.task(dense)
    keep_profile(inputs.clock, context.folder.path)
    keep_provenance(task, context.config, context.folder, (*inputs.construct.notes, *inputs.notes))
    return task


def dense_baseline(construct: Constructor, splits: Splits, context: RunContext) -> nn.Module:
    """The dense network in evaluation mode, trained on the fit split and kept in `base/`."""
    folder = context.folder
    if not (folder / "base").is_dir():
        model = construct()
        train_baseline(model, splits, context, folder / "base-snapshot.pt")
        with folder.stage("base") as working:
            save_weights(model, working / WEIGHTS)
        for file in snapshots_of(folder / "base-snapshot.pt"):
            file.unlink(missing_ok=True)
    return load_network(construct, str(folder / "base" / WEIGHTS))


def train_baseline(model: nn.Module, splits: Splits, context: RunContext, snapshot: Path) -> BaseTraining:
    """Train `model` in place with the configuration's `base` settings; resumes from `snapshot` if it is there."""
    config = context.config
    chosen, seed = settings(config.base, TrainSettings), derive_seed(config.seed, "base")
    context.terminal.say(f"Training the base network: {_amount(chosen, splits)}")
    with _shown("base network", splits, chosen, context) as report:
        trained = train_base(model, splits, chosen, **report, seed=seed, snapshot=snapshot)
    if sentence := trained.sentence(splits.objective.name):
        context.terminal.warn(sentence)
    return trained


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned network, the seconds it took, and what the reward split said of it ({} in runs of version 0.1.0)."""

    model: nn.Module
    seconds: float
    judged: Mapping[str, Any]


def finetune(dense: nn.Module, pruned: nn.Module, splits: Splits, context: RunContext) -> Tuned:
    """A fine-tuned copy of `pruned`, or itself where that is better; a finished one is taken from the run folder."""
    folder, chosen = context.folder, settings(context.config.finetune, TrainSettings)
    if not (folder / "finetune").is_dir():
        started = time.perf_counter()
        context.terminal.say(f"Fine-tuning: {_amount(chosen, splits)}")
        snapshot, seed = folder / "finetune-snapshot.pt", derive_seed(context.config.seed, "finetune")
        teacher = dense if chosen.distill_weight > 0 else None
        with _shown("finetune", splits, chosen, context) as report:
            model, judged = fine_tune(pruned, splits, chosen, **report, seed=seed, snapshot=snapshot, teacher=teacher)
        seconds = time.perf_counter() - started
        sentence = judged.sentence(splits.objective.name)
        with folder.stage("finetune") as working:
            save_weights(model, working / WEIGHTS)
            (working / "seconds.txt").write_text(f"{seconds}\n")
            (working / JUDGED).write_text(json.dumps({**judged.facts(), "sentence": sentence}, indent=2) + "\n")
        for file in snapshots_of(snapshot):
            file.unlink(missing_ok=True)
    model = copied(pruned)
    load_checkpoint(model, folder / "finetune" / WEIGHTS)
    judgement = RunFolder(folder / "finetune").read_json(JUDGED) or {}
    return Tuned(model.eval(), _seconds(folder / "finetune/seconds.txt"), judgement)


def _amount(chosen: TrainSettings, splits: Splits) -> str:
    return f"{chosen.epochs:g} epoch{'s' * (chosen.epochs != 1)} on {len(splits.fit)} images"


def _seconds(file: Path) -> float:
    try:
        seconds = float(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise UserError(f"{str(file)!r} is damaged (no number of seconds); put back the file that the run wrote.")
    return seconds


@contextmanager
def _shown(what: str, splits: Splits, chosen: TrainSettings, context: RunContext) -> Iterator[dict[str, Any]]:
    """A bar and scalars for a training: whom it tells, with the augmentation and the device of the configuration."""
    metric, tag = display_name(splits.objective.name), what.replace(" ", "_")
    with context.terminal.progress(what, chosen.epochs) as bar:

        def report(progress: TrainProgress) -> None:
            bar.advance(progress.epoch, epoch_line(progress, metric))
            context.tracker.scalars(tag, {"loss": progress.loss, "accuracy": progress.accuracy}, progress.step)

        augment, device = build_augment(context.config.augment), resolve_device(context.config.device)
        yield {"progress": report, "augment": augment, "device": device}


def epoch_line(progress: TrainProgress, metric: str) -> str:
    """What stands beside a bar after an epoch; `metric` as it is called for display."""
    score = f"{metric} {100 * progress.accuracy:.1f} %"
    return f"loss {progress.loss:.3f}, {score}, {progress.images_per_second:,.0f} images/s"


def build_recovery(dense: nn.Module, context: RunContext) -> Recovery:
    """What follows every cut, with a bar of its own."""
    terminal = context.terminal
    chosen, augment = settings(context.config.recovery, RecoverySettings), build_augment(context.config.augment)

    def shown(task: PruningTask, seed: int, working: Path) -> nn.Module:
        metric = display_name(task.objective.name)

        def report(progress: TrainProgress) -> None:
            terminal.advance(progress.epoch, epoch_line(progress, metric))

        with terminal.progress("recovery", chosen.train.epochs):
            return Recover(chosen, dense, augment, report)(task, seed, working)

    return shown
