"""Results of a run: the report split opened once, the smaller CNN saved, latency measured, tables and report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ...envs.data.objective import display_name
from ...envs.data.splits import Splits
from ...envs.evaluation.mask_evaluator import accuracy_on
from ...envs.files.pruned_network import save_pruned
from ...envs.networks.checkpoint import hash_state
from ...envs.networks.cost import count_cost
from ...envs.surgery.kept_channels import KeptChannels
from ..config.build import made_of
from ..config.entry_point import plain
from ..config.training import Tuned
from ..deploy.export import export_all
from ..deploy.latency import measure_latency, paired, speed_advice, speed_change
from ..pruning.input_checks import resolve_device
from ..pruning.schedule import LayerRecord
from ..reporting.cards import bound_sentence, finetune_sentence
from ..runs.console import signed
from ..runs.context import RunContext
from ..runs.folder import METRICS, RunFolder

CUT = "cut"


@dataclass
class Networks:
    """The three states of a run's network."""

    dense: nn.Module
    pruned: nn.Module
    finetuned: nn.Module


def report_accuracy(model: nn.Module, splits: Splits) -> float:
    """Accuracy on the report split, a fraction. Called at the end only; nothing is ever chosen on it."""
    return accuracy_on(model, splits.report)


def metrics_of(
    networks: Networks, splits: Splits, records: Sequence[LayerRecord], config: DictConfig, tuned: Tuned
) -> dict[str, Any]:
    """Everything that `metrics.json` holds; accuracies are fractions on the report split unless named otherwise."""
    example = splits.example.to(resolve_device(config.device))
    dense, pruned = count_cost(networks.dense, example), count_cost(networks.pruned, example)
    return {
        "metric": splits.objective.name,
        "base_accuracy": report_accuracy(networks.dense, splits),
        "pruned_accuracy": report_accuracy(networks.pruned, splits),
        "finetuned_accuracy": report_accuracy(networks.finetuned, splits),
        "base_macs": dense.macs,
        "pruned_macs": pruned.macs,
        "base_params": dense.params,
        "pruned_params": pruned.params,
        "search_seconds": sum(record.search_seconds for record in records),
        "recovery_seconds": sum(record.recovery_seconds for record in records),
        "finetune_seconds": tuned.seconds,
        "finetune": dict(tuned.judged),
        "drop_bound": config.drop_bound,
        "bound_held": all(record.within_bound for record in records),
        "gave_way": [record.name for record in records if not record.within_bound],
        **latency_metrics(networks, example, pruned.macs / dense.macs, config),
        "groups": [group_facts(record) for record in records],
    }


def latency_metrics(
    networks: Networks, example: torch.Tensor, macs_fraction: float, config: DictConfig
) -> dict[str, Any]:
    """Latency of the dense and the fine-tuned network, runtimes that failed, and advice where time did not fall."""
    failed: dict[str, str] = {}
    models = {"base": networks.dense, "pruned": networks.finetuned}
    latency = [asdict(each) for each in measure_latency(models, example, **plain(config.latency), failed=failed)]
    advice = speed_advice(macs_fraction, latency, config.surgery.round_to)
    return {"latency": latency, "latency_failed": failed, "advice": [advice] if advice else []}


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
        "compensated": record.facts.get("compensated", []),
        "not_compensated": record.facts.get("not_compensated", {}),
    }


def save_result(
    networks: Networks,
    kept: KeptChannels,
    splits: Splits,
    context: RunContext,
) -> dict[str, Any]:
    """The smaller CNN in `pruned/`: weights and architecture, loadable without pickle, and the exports asked for.

    In `pruned/cut/` it lies as it was cut, before fine-tuning.

    Returns what `metrics.json` says of the exports: files with their measured difference, and failures by kind.
    """
    config, facts = context.config, {"base_sha256": hash_state(networks.dense)}
    with context.folder.stage("pruned") as working:
        images = splits.reward.batch(torch.arange(min(5, len(splits.reward))))[0]
        example, constructor = images[:1], made_of(config.network)
        # As it was cut, too: what fine-tuning made of it is not for everyone the better one.
        save_pruned(networks.pruned, working / CUT, kept=kept, constructor=constructor, facts=facts, example=example)
        save_pruned(networks.finetuned, working, kept=kept, constructor=constructor, facts=facts, example=example)
        # A network that cannot be exported is found last; hours of work are not thrown away for it.
        exported, failed = export_all(networks.finetuned, images, working, plain(config.get("export")) or [])
    return {"exports": [{**each, "file": f"pruned/{each['file']}"} for each in exported], "exports_failed": failed}


def total_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table of the whole network, as text."""

    def points(name: str) -> str:
        return f"{signed(100 * (metrics[name] - metrics['base_accuracy']))} points"

    def amount(label: str, name: str) -> tuple[str, str, str, str]:
        before, after = metrics[f"base_{name}"], metrics[f"pruned_{name}"]
        return label, f"{before:,}", f"{after:,}", f"{signed(100 * (after / before - 1), 1)} %"

    base, metric = f"{100 * metrics['base_accuracy']:.2f} %", display_name(metrics.get("metric"))
    rows = [
        (f"{metric}, pruned", base, f"{100 * metrics['pruned_accuracy']:.2f} %", points("pruned_accuracy")),
        (f"{metric}, fine-tuned", base, f"{100 * metrics['finetuned_accuracy']:.2f} %", points("finetuned_accuracy")),
        amount("MACs per image", "macs"),
        amount("parameters", "params"),
    ]
    return rows + latency_rows(metrics["latency"])


def latency_rows(latency: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Measured latency, one row per runtime and batch size: median and quartiles."""
    rows = []
    for (runtime, batch), (base, pruned) in paired(latency).items():
        threads = f"{base['n_threads']} thread{'s' if base['n_threads'] > 1 else ''}"
        times = _milliseconds(base), _milliseconds(pruned)
        rows.append((f"latency, batch {batch}, {runtime}, {threads}", *times, speed_change(base, pruned)))
    return rows


def _milliseconds(record: Mapping[str, Any]) -> str:
    low, median, high = (1e3 * record[f"{name}_seconds"] for name in ("low", "median", "high"))
    return f"{median:.2f} ms ({low:.2f} to {high:.2f})"


def markdown_report(metrics: Mapping[str, Any], folder: RunFolder, command: str = "prune") -> str:
    """`report.md`: the same two tables for a file."""
    lines = [f"# keepdrop {command}", "", "| | base | pruned | change |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in total_rows(metrics)]
    lines += ["", "| layer | filters before | after | decided by |", "|---|---:|---:|---|"]
    lines += [f"| {g['name']} | {g['n_filters']} | {g['n_kept']} | {g['decided_by']} |" for g in metrics["groups"]]
    name = display_name(metrics.get("metric"), opens=True)
    lines += ["", f"{name} is measured on the report split, which nothing was chosen on.", ""]
    lines += [
        f"Latency is the median of {_repeats(metrics)} passes (quartiles in brackets), both networks in turn.",
        "",
    ]
    lines += [f"- {sentence}" for sentence in remarks(metrics)]
    if text := bound_sentence(metrics):
        lines.append(text)
    return "\n".join(lines) + "\n"


def _repeats(metrics: Mapping[str, Any]) -> int:
    return max((record["repeats"] for record in metrics["latency"]), default=0)


def remarks(metrics: Mapping[str, Any]) -> list[str]:
    """What a reader has to know beside the figures: time that did not fall, runtimes and exports that failed."""
    failed = {**metrics.get("latency_failed", {}), **metrics.get("exports_failed", {})}
    written = [
        f"{each['file']}: {each['kind']}, largest difference {each['largest_difference']:.0e} of the largest output."
        for each in metrics.get("exports", [])
    ]
    said = [sentence] if (sentence := finetune_sentence(metrics)) else []
    return [*said, *written, *metrics.get("advice", []), *(f"{name}: {why}" for name, why in failed.items())]


def write_results(metrics: Mapping[str, Any], folder: RunFolder, command: str = "prune") -> None:
    """`report.md`, then `metrics.json`, whose presence says that the run is complete."""
    folder.write_text("report.md", markdown_report(metrics, folder, command))
    folder.write_json(METRICS, metrics)


def show_results(metrics: Mapping[str, Any], context: RunContext) -> None:
    """The final tables and warnings."""
    terminal = context.terminal
    terminal.layers(metrics["groups"])
    terminal.totals(total_rows(metrics))
    for sentence in remarks(metrics):
        terminal.console.print(sentence, markup=False)
    if text := bound_sentence(metrics):
        terminal.warn(text)
