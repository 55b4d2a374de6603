"""`keepdrop train-cnn`: a base network, its reward split held out of the training."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig

from ...envs.data.objective import display_name
from ...envs.data.splits import Splits
from ...envs.evaluation.mask_evaluator import accuracy_on
from ...envs.networks.checkpoint import save_weights
from ...envs.networks.cost import count_cost
from ..config.baseline_training import WEIGHTS, train_base
from ..config.build import build_augment, build_splits, network_constructor
from ..config.entry_point import interruptible, open_run, run_with_hydra, settings
from ..config.ignored import BASE_TRAINING, refuse_ignored
from ..pruning.input_checks import resolve_device, try_network
from ..runs.console import Terminal
from ..runs.folder import FACTS, METRICS, RunFolder
from ..runs.provenance import provenance
from ..runs.seeds import derive_seed
from ..runs.tracking import Tracker
from ..training.loop import TrainSettings, check_augment
from .report import keep_report


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("train_cnn", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Train, or go on training; returns what `metrics.json` holds."""
    if config.resume is None:
        check(config)
    folder, config = open_run(config)
    terminal = Terminal(config.quiet)
    metrics = folder.read_json(METRICS)
    if metrics is None:
        with interruptible(folder):
            metrics = train(config, folder, terminal)
    metric = display_name(metrics.get("metric"), opens=True)
    terminal.console.print(
        f"{metric}: {100 * metrics['report_accuracy']:.2f} % on {metrics['n_report']} report images, "
        f"{metrics['macs']:,} MACs, {metrics['params']:,} parameters",
        markup=False,
    )
    keep_report(folder, terminal)
    terminal.console.print(f"Weights: {folder / WEIGHTS}", markup=False)
    return metrics


def check(config: DictConfig) -> None:
    """Find every mistake of the user's before anything is written."""
    refuse_ignored(config, BASE_TRAINING)
    settings(config.base, TrainSettings)
    resolve_device(config.device)
    augment, splits = build_augment(config.augment), build_splits(config)
    check_augment(augment, splits.fit)
    try_network(network_constructor(config.network)(), splits)


def train(config: DictConfig, folder: RunFolder, terminal: Terminal) -> dict[str, Any]:
    """Train the network and write weights, facts and metrics."""
    splits = build_splits(config)
    tracker = Tracker(folder / "tensorboard")
    folder.write_json(FACTS, provenance(config.seed) | {"splits": splits.summary()})
    model = network_constructor(config.network, derive_seed(config.seed, "init"))().to(resolve_device(config.device))
    snapshot = folder / "snapshot.pt"
    train_base(model, config, splits, snapshot, terminal, tracker)
    model.eval()
    save_weights(model, folder / WEIGHTS)
    snapshot.unlink(missing_ok=True)
    tracker.close()
    metrics = metrics_of(model, splits)
    folder.write_json(METRICS, metrics)
    return metrics


def metrics_of(model: torch.nn.Module, splits: Splits) -> dict[str, Any]:
    """Accuracies (fractions) on the reward and the report split, and what the network costs."""
    example = splits.reward.batch(torch.arange(1))[0]
    cost = count_cost(model, example.to(next(model.parameters()).device))
    accuracies: dict[str, float] = {}
    for role in ("reward", "report"):
        images = getattr(splits, role)
        accuracies |= {f"{role}_accuracy": accuracy_on(model, images), f"n_{role}": len(images)}
    return accuracies | {"metric": splits.objective.name, "macs": cost.macs, "params": cost.params}
