"""The base network of a run: a checkpoint of the user's, or one trained on the spot."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from ...envs.data.objective import display_name
from ...envs.data.splits import Splits
from ...envs.networks.checkpoint import save_weights
from ...envs.task import PruningTask
from ..pruning.input_checks import resolve_device
from ..runs.console import Terminal
from ..runs.folder import RunFolder
from ..runs.provenance import keep_provenance
from ..runs.seeds import derive_seed
from ..runs.tracking import Tracker
from ..training.loop import TrainProgress, TrainSettings, fit_network
from .build import Constructor, build_augment, load_network
from .entry_point import settings
from .prepare import Inputs

WEIGHTS = "model.safetensors"


def begin_task(
    inputs: Inputs,
    config: DictConfig,
    folder: RunFolder,
    terminal: Terminal,
    tracker: Tracker | None = None,
    pruning: DictConfig | None = None,
) -> PruningTask:
    """The task on the dense network, which is trained first where there is no checkpoint; the run's facts are kept.

    Args:
        inputs: checked.
        config: root configuration.
        folder: of the run.
        terminal: shows progress.
        tracker: gets the training's curve; None makes one for it, if there is a training.
        pruning: the configuration as `keepdrop prune` knows it, where the command is another one (`as_prune`).
    """
    dense = inputs.dense
    if dense is None:
        own = tracker or Tracker(folder / "tensorboard")
        dense = base_network(config, inputs.construct, inputs.splits, folder, terminal, own).to(inputs.device)
        if tracker is None:
            own.close()
    task = inputs.task(dense, config if pruning is None else pruning)
    keep_provenance(task, config, folder)
    return task


def base_network(
    config: DictConfig, construct: Constructor, splits: Splits, folder: RunFolder, terminal: Terminal, tracker: Tracker
) -> nn.Module:
    """The dense network in evaluation mode, from `checkpoint`, or trained on the fit split and kept in `base/`."""
    if config.get("checkpoint"):
        return load_network(construct, config.checkpoint)
    if not (folder / "base").is_dir():
        model = construct()
        train_base(model, config, splits, folder / "base-snapshot.pt", terminal, tracker)
        with folder.stage("base") as working:
            save_weights(model, working / WEIGHTS)
        (folder / "base-snapshot.pt").unlink(missing_ok=True)
    return load_network(construct, str(folder / "base" / WEIGHTS))


def train_base(
    model: nn.Module, config: DictConfig, splits: Splits, snapshot: Path, terminal: Terminal, tracker: Tracker
) -> None:
    """Train `model` in place with the configuration's `base` settings; goes on from `snapshot` if it is there."""
    chosen = settings(config.base, TrainSettings)
    terminal.say(f"Training the base network: {chosen.epochs:g} epochs on {len(splits.fit)} images")
    train_with_progress(
        "base network",
        model,
        splits,
        chosen,
        derive_seed(config.seed, "base"),
        config,
        terminal,
        tracker,
        snapshot=snapshot,
    )


def train_with_progress(
    what: str,
    model: nn.Module,
    splits: Splits,
    chosen: TrainSettings,
    seed: int,
    config: DictConfig,
    terminal: Terminal,
    tracker: Tracker,
    teacher: nn.Module | None = None,
    snapshot: Path | None = None,
) -> None:
    """`fit_network` on the fit split with a progress bar and scalars."""
    metric = display_name(splits.objective.name)
    with terminal.progress(what, chosen.epochs) as bar:

        def report(progress: TrainProgress) -> None:
            bar.advance(progress.epoch, f"loss {progress.loss:.3f}, {metric} {100 * progress.accuracy:.1f} %")
            tracker.scalars(
                what.replace(" ", "_"), {"loss": progress.loss, "accuracy": progress.accuracy}, progress.step
            )

        fit_network(
            model,
            splits.fit,
            chosen,
            seed=seed,
            augment=build_augment(config.augment),
            teacher=teacher,
            progress=report,
            snapshot=snapshot,
            device=resolve_device(config.device),
        )
