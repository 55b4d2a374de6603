"""`keepdrop train-cnn`: a base network, its reward split held out of the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from ...envs.data.objective import display_name
from ...envs.data.packing import packing_of
from ...envs.data.splits import Splits
from ...envs.evaluation.mask_evaluator import accuracy_on
from ...envs.networks.checkpoint import save_weights
from ...envs.networks.cost import count_cost
from ..config.build import NetworkConstructor, build_splits
from ..config.entry_point import run_with_hydra
from ..config.ignored import BASE_TRAINING, refuse_ignored
from ..config.prepare import check_augmentation
from ..config.training import WEIGHTS, train_baseline
from ..pruning.input_checks import resolve_device, try_network
from ..runs.context import RunContext
from ..runs.folder import FACTS, METRICS
from ..runs.provenance import provenance
from ..runs.seeds import derive_seed
from ..training.guarded import snapshots_of
from .running import carry_out


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("train_cnn", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Train, or resume a training; returns what `metrics.json` holds."""
    return carry_out(config, check, train, show)


def check(config: DictConfig) -> Splits:
    """Find everything that is wrong with the input before anything is written."""
    refuse_ignored(config, BASE_TRAINING)
    resolve_device(config.device)
    splits = build_splits(config)
    check_augmentation(config, splits)
    try_network(NetworkConstructor(config.network, 0, splits.example, packing_of(splits.fit))(), splits)
    return splits


def train(splits: Splits, context: RunContext) -> dict[str, Any]:
    """Train the network and write weights, provenance and metrics."""
    config, folder = context.config, context.folder
    folder.write_json(FACTS, provenance(config.seed) | {"splits": splits.summary()})
    seed = derive_seed(config.seed, "init")
    construct = NetworkConstructor(config.network, seed, splits.example, packing_of(splits.fit))
    model = construct().to(resolve_device(config.device))
    for note in construct.notes:
        context.terminal.say(note)
    snapshot = folder / "snapshot.pt"
    trained = train_baseline(model, splits, context, snapshot)
    model.eval()
    save_weights(model, folder / WEIGHTS)
    for file in snapshots_of(snapshot):
        file.unlink(missing_ok=True)
    metrics = metrics_of(model, splits) | {"lr": trained.lr}
    folder.write_json(METRICS, metrics)
    return metrics


def show(metrics: Mapping[str, Any], context: RunContext) -> None:
    """One line about the network, and where its weights are."""
    metric = display_name(metrics.get("metric"), opens=True)
    context.terminal.console.print(
        f"{metric}: {100 * metrics['report_accuracy']:.2f} % on {metrics['n_report']} report images, "
        f"{metrics['macs']:,} MACs, {metrics['params']:,} parameters",
        markup=False,
    )
    context.terminal.console.print(f"Weights: {context.folder / WEIGHTS}", markup=False)


def metrics_of(model: torch.nn.Module, splits: Splits) -> dict[str, Any]:
    """Accuracies (fractions) on the reward and the report split, and what the network costs."""
    cost = count_cost(model, splits.example.to(next(model.parameters()).device))
    accuracies: dict[str, float] = {}
    for role in ("reward", "report"):
        images = getattr(splits, role)
        accuracies |= {f"{role}_accuracy": accuracy_on(model, images), f"n_{role}": len(images)}
    return accuracies | {"metric": splits.objective.name, "macs": cost.macs, "params": cost.params}
