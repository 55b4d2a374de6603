"""Training in a run: the dense baseline, recovery after a cut, fine-tuning; each shown, recorded and resumable."""

from __future__ import annotations

import math
import time
from pathlib import Path

from torch import nn

from ...envs.data.objective import display_name
from ...envs.data.splits import Splits
from ...envs.networks.checkpoint import load_checkpoint, save_weights
from ...envs.networks.copying import copied
from ...envs.task import PruningTask
from ...errors import UserError
from ..pruning.input_checks import resolve_device
from ..pruning.recover import Recover, RecoverySettings
from ..pruning.schedule import Recovery
from ..runs.context import RunContext
from ..runs.provenance import keep_provenance
from ..runs.seeds import derive_seed
from ..training.loop import TrainProgress, TrainSettings, fit_network
from .build import Constructor, build_augment, load_network
from .entry_point import settings
from .prepare import Inputs

WEIGHTS = "model.safetensors"


def begin_task(inputs: Inputs, context: RunContext) -> PruningTask:
    """The task on the dense network, which is trained first where there is no checkpoint; its provenance is kept."""
    dense = inputs.dense
    if dense is None:
        dense = dense_baseline(inputs.construct, inputs.splits, context).to(inputs.device)
    for note in inputs.construct.notes:
        context.terminal.say(note)
    task = inputs.task(dense)
    keep_provenance(task, context.config, context.folder)
    return task


def dense_baseline(construct: Constructor, splits: Splits, context: RunContext) -> nn.Module:
    """The dense network in evaluation mode, trained on the fit split and kept in `base/`."""
    folder = context.folder
    if not (folder / "base").is_dir():
        model = construct()
        train_baseline(model, splits, context, folder / "base-snapshot.pt")
        with folder.stage("base") as working:
            save_weights(model, working / WEIGHTS)
        (folder / "base-snapshot.pt").unlink(missing_ok=True)
    return load_network(construct, str(folder / "base" / WEIGHTS))


def train_baseline(model: nn.Module, splits: Splits, context: RunContext, snapshot: Path) -> None:
    """Train `model` in place with the configuration's `base` settings; resumes from `snapshot` if it is there."""
    config = context.config
    chosen, seed = settings(config.base, TrainSettings), derive_seed(config.seed, "base")
    context.terminal.say(f"Training the base network: {chosen.epochs:g} epochs on {len(splits.fit)} images")
    _train("base network", model, splits, chosen, seed, context, snapshot)


def finetune(dense: nn.Module, pruned: nn.Module, splits: Splits, context: RunContext) -> tuple[nn.Module, float]:
    """A fine-tuned copy of `pruned`, and the seconds it took; a finished one is taken from the run folder."""
    folder, chosen = context.folder, settings(context.config.finetune, TrainSettings)
    model = copied(pruned)
    if not (folder / "finetune").is_dir():
        started = time.perf_counter()
        context.terminal.say(f"Fine-tuning: {chosen.epochs:g} epochs on {len(splits.fit)} images")
        snapshot, seed = folder / "finetune-snapshot.pt", derive_seed(context.config.seed, "finetune")
        teacher = dense if chosen.distill_weight > 0 else None
        _train("finetune", model, splits, chosen, seed, context, snapshot, teacher)
        seconds = time.perf_counter() - started
        with folder.stage("finetune") as working:
            save_weights(model, working / WEIGHTS)
            (working / "seconds.txt").write_text(f"{seconds}\n")
        snapshot.unlink(missing_ok=True)
    load_checkpoint(model, folder / "finetune" / WEIGHTS)
    return model.eval(), _seconds(folder / "finetune/seconds.txt")


def _seconds(file: Path) -> float:
    try:
        seconds = float(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise UserError(f"{str(file)!r} is damaged (no number of seconds); put back the file that the run wrote.")
    return seconds


def _train(
    what: str,
    model: nn.Module,
    splits: Splits,
    chosen: TrainSettings,
    seed: int,
    context: RunContext,
    snapshot: Path,
    teacher: nn.Module | None = None,
) -> None:
    """`fit_network` on the fit split with a progress bar and scalars."""
    metric, tag = display_name(splits.objective.name), what.replace(" ", "_")
    with context.terminal.progress(what, chosen.epochs) as bar:

        def report(progress: TrainProgress) -> None:
            bar.advance(progress.epoch, f"loss {progress.loss:.3f}, {metric} {100 * progress.accuracy:.1f} %")
            context.tracker.scalars(tag, {"loss": progress.loss, "accuracy": progress.accuracy}, progress.step)

        fit_network(
            model,
            splits.fit,
            chosen,
            seed=seed,
            augment=build_augment(context.config.augment),
            teacher=teacher,
            progress=report,
            snapshot=snapshot,
            device=resolve_device(context.config.device),
        )


def build_recovery(dense: nn.Module, context: RunContext) -> Recovery:
    """What follows every cut, with a bar of its own."""
    terminal = context.terminal
    chosen, augment = settings(context.config.recovery, RecoverySettings), build_augment(context.config.augment)

    def shown(task: PruningTask, seed: int, working: Path) -> nn.Module:
        metric = display_name(task.objective.name)

        def report(progress: TrainProgress) -> None:
            terminal.advance(progress.epoch, f"loss {progress.loss:.3f}, {metric} {100 * progress.accuracy:.1f} %")

        with terminal.progress("recovery", chosen.train.epochs):
            return Recover(chosen, dense, augment, report)(task, seed, working)

    return shown
