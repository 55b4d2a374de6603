"""The end of a run: fine-tune, open the report split once, save the smaller CNN, measure, and write it all down."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ..envs.checkpoint import load_checkpoint, save_weights
from ..envs.cost import count_cost
from ..envs.evaluate import count_correct
from ..envs.latency import measure_latency
from ..envs.pruned_file import KeptChannels, save_pruned
from ..envs.splits import Splits
from ..envs.training import TrainSettings
from .base import train_with_progress
from .checks import resolve_device
from .console import Terminal
from .doors import plain, settings
from .run_folder import METRICS, RunFolder
from .schedule import LayerRecord
from .seeds import derive_seed
from .tracking import Tracker

WEIGHTS = "model.safetensors"


@dataclass
class Networks:
    """The three states of a run's network."""

    dense: nn.Module
    pruned: nn.Module
    finetuned: nn.Module


def finetune(
    dense: nn.Module,
    pruned: nn.Module,
    splits: Splits,
    config: DictConfig,
    folder: RunFolder,
    terminal: Terminal,
    tracker: Tracker,
    name: str = "finetune",
) -> tuple[nn.Module, float]:
    """A fine-tuned copy of `pruned`, and the seconds it took; a finished one is taken from the run folder."""
    chosen = settings(config.finetune, TrainSettings)
    model = copy.deepcopy(pruned)
    if not (folder / name).is_dir():
        started = time.perf_counter()
        terminal.say(f"Fine-tuning: {chosen.epochs:g} epochs on {len(splits.fit)} images")
        snapshot = folder / f"{name}-snapshot.pt"
        train_with_progress(
            name,
            model,
            splits,
            chosen,
            derive_seed(config.seed, "finetune"),
            config,
            terminal,
            tracker,
            teacher=dense if chosen.distill_weight > 0 else None,
            snapshot=snapshot,
        )
        seconds = time.perf_counter() - started
        with folder.stage(name) as working:
            save_weights(model, working / WEIGHTS)
            (working / "seconds.txt").write_text(f"{seconds}\n")
        snapshot.unlink(missing_ok=True)
    load_checkpoint(model, folder / name / WEIGHTS)
    return model.eval(), float((folder / name / "seconds.txt").read_text())


def report_accuracy(model: nn.Module, splits: Splits) -> float:
    """Accuracy on the report split, a fraction. Called at the end only; nothing is ever chosen on it."""
    correct, total = count_correct(model, splits.report)
    return correct / total


def metrics_of(
    networks: Networks, splits: Splits, records: Sequence[LayerRecord], config: DictConfig, finetune_seconds: float
) -> dict[str, Any]:
    """Everything that `metrics.json` holds; accuracies are fractions on the report split unless named otherwise."""
    example = splits.reward.batch(torch.arange(1))[0].to(resolve_device(config.device))
    dense, pruned = count_cost(networks.dense, example), count_cost(networks.pruned, example)
    latency = measure_latency({"base": networks.dense, "pruned": networks.finetuned}, example, **plain(config.latency))
    return {
        "base_accuracy": report_accuracy(networks.dense, splits),
        "pruned_accuracy": report_accuracy(networks.pruned, splits),
        "finetuned_accuracy": report_accuracy(networks.finetuned, splits),
        "base_macs": dense.macs,
        "pruned_macs": pruned.macs,
        "base_params": dense.params,
        "pruned_params": pruned.params,
        "search_seconds": sum(record.search_seconds for record in records),
        "recovery_seconds": sum(record.recovery_seconds for record in records),
        "finetune_seconds": finetune_seconds,
        "drop_bound": config.drop_bound,
        "bound_held": all(record.within_bound for record in records),
        "gave_way": [record.name for record in records if not record.within_bound],
        "latency": [asdict(record) for record in latency],
        "groups": [group_facts(record) for record in records],
    }


def group_facts(record: LayerRecord) -> dict[str, Any]:
    """One row of the table of layers."""
    return {
        "name": record.name,
        "n_filters": record.n_filters,
        "n_kept": record.n_kept,
        "decided_by": record.decided_by,
        "reward_split_accuracy": record.pruned_accuracy,
        "recovered_accuracy": record.recovered_accuracy,
        "within_bound": record.within_bound,
        "search_seconds": record.search_seconds,
    }


def save_result(
    networks: Networks, kept: KeptChannels, config: DictConfig, folder: RunFolder, facts: Mapping[str, Any]
) -> None:
    """The smaller CNN in `pruned/`: weights and architecture, loadable without pickle."""
    with folder.stage("pruned") as working:
        save_pruned(networks.finetuned, working, kept=kept, constructor=plain(config.network), facts=facts)


def total_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table of the whole network, as text."""

    def points(name: str) -> str:
        return f"{100 * (metrics[name] - metrics['base_accuracy']):+.2f} points"

    def amount(label: str, name: str) -> tuple[str, str, str, str]:
        before, after = metrics[f"base_{name}"], metrics[f"pruned_{name}"]
        return label, f"{before:,}", f"{after:,}", f"{100 * (after / before - 1):+.1f} %"

    base = f"{100 * metrics['base_accuracy']:.2f} %"
    rows = [
        ("accuracy, pruned", base, f"{100 * metrics['pruned_accuracy']:.2f} %", points("pruned_accuracy")),
        ("accuracy, fine-tuned", base, f"{100 * metrics['finetuned_accuracy']:.2f} %", points("finetuned_accuracy")),
        amount("MACs an image", "macs"),
        amount("parameters", "params"),
    ]
    return rows + latency_rows(metrics["latency"])


def latency_rows(latency: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Measured latency, one row a batch size."""
    rows = []
    for batch in sorted({record["batch_size"] for record in latency}):
        median = {record["model"]: record["median_seconds"] for record in latency if record["batch_size"] == batch}
        faster = f"{median['base'] / median['pruned']:.2f} x faster"
        rows.append(
            (f"latency, batch {batch}", f"{1e3 * median['base']:.2f} ms", f"{1e3 * median['pruned']:.2f} ms", faster)
        )
    return rows


def markdown_report(metrics: Mapping[str, Any], folder: RunFolder) -> str:
    """`report.md`: the same two tables for a file."""
    lines = ["# keepdrop prune", "", "| | base | pruned | change |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in total_rows(metrics)]
    lines += ["", "| layer | filters before | after | decided by |", "|---|---:|---:|---|"]
    lines += [f"| {g['name']} | {g['n_filters']} | {g['n_kept']} | {g['decided_by']} |" for g in metrics["groups"]]
    lines += ["", "Accuracy is measured on the report split, which nothing was chosen on.", ""]
    if metrics["gave_way"]:
        lines.append(f"The drop bound of {metrics['drop_bound']:g} did not hold at: {', '.join(metrics['gave_way'])}.")
    return "\n".join(lines) + "\n"


def write_results(metrics: Mapping[str, Any], folder: RunFolder) -> None:
    """`report.md`, then `metrics.json`, whose presence says that the run is complete."""
    folder.write_text("report.md", markdown_report(metrics, folder))
    folder.write_json(METRICS, metrics)


def show_results(metrics: Mapping[str, Any], folder: RunFolder, terminal: Terminal) -> None:
    """The final tables, warnings, and where everything lies."""
    terminal.layers(metrics["groups"])
    terminal.totals(total_rows(metrics))
    if metrics["gave_way"]:
        terminal.warn(
            f"the drop bound of {metrics['drop_bound']:g} did not hold at {', '.join(metrics['gave_way'])}; see "
            f"{METRICS}."
        )
    terminal.console.print(f"Run folder: {folder.path}", markup=False)
