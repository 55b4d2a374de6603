"""Results of a run: the report split opened once, the smaller CNN saved, latency measured, tables and report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
from ..deploy.export import INT8, RUNTIME, as_exported, export_all
from ..deploy.fastest import code_of, fastest_ways, int8_times, not_timed_sentence
from ..deploy.int8 import int8_sentence
from ..deploy.latency import measure_latency, paired, speed_advice, speed_change
from ..deploy.runtimes import chosen_runtimes, not_timed
from ..pruning.input_checks import resolve_device
from ..pruning.schedule import LayerRecord
from ..reporting.cards import BUILT_IN, bound_sentence, finetune_sentence, target_sentences
from ..reporting.predictions import write_predictions
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
        "groups": [group_facts(record) for record in records],
        "target": target_facts(records),
    }


def latency_metrics(
    networks: Networks, splits: Splits, metrics: Mapping[str, Any], context: RunContext
) -> dict[str, Any]:
    """Latency of the dense and the fine-tuned network, and of its int8 file where there is one.

    Args:
        networks: the run's.
        splits: theirs, for an image.
        metrics: with MACs and what `save_result` returned.
        context: the run's.

    Returns what `metrics.json` says of it: the records, runtimes that failed or were not timed, and advice where time
    did not fall.
    """
    config, failed = context.config, dict[str, str]()
    device = resolve_device(config.device)
    dense, example = as_exported(networks.dense, splits.example.to(device))
    models = {"base": dense, "pruned": as_exported(networks.finetuned, splits.example.to(device))[0]}
    chosen = plain(config.latency)
    runtimes = chosen_runtimes(chosen.pop("runtimes"), device)
    exported = {each["kind"]: context.folder.path / each["file"] for each in metrics["exports"]}
    files = {"int8": exported[INT8]} if INT8 in exported else {}
    if files and device.type != "cpu":
        failed[INT8], files = f"it is timed on the CPU, not on {device}.", {}
    if files and RUNTIME not in runtimes:
        runtimes.append(RUNTIME)  # float32 beside int8
    timed = measure_latency(models, example, runtimes=runtimes, failed=failed, files=files, **chosen)
    latency = [asdict(each) for each in timed]
    advice = speed_advice(metrics["pruned_macs"] / metrics["base_macs"], latency, config.surgery.round_to)
    return {
        "latency": latency,
        "latency_failed": failed,
        "latency_not_timed": not_timed(runtimes, device),
        "advice": [advice] if advice else [],
    }


def target_facts(records: Sequence[LayerRecord]) -> list[dict[str, Any]]:
    """Every resource of the target, before and after the cut; empty where layers were decided one by one."""
    return list(records[0].facts.get("target") or []) if records else []


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
        images = splits.examples(5)
        example, constructor = images[:1], made_of(config.network)
        # As it was cut, too: what fine-tuning made of it is not for everyone the better one.
        save_pruned(networks.pruned, working / CUT, kept=kept, constructor=constructor, facts=facts, example=example)
        save_pruned(networks.finetuned, working, kept=kept, constructor=constructor, facts=facts, example=example)
        # A network that cannot be exported is found last; hours of work are not thrown away for it.
        kinds = plain(config.get("export")) or []
        exported, failed = export_all(networks.finetuned, images, working, kinds, splits)
    write_predictions(vars(networks), splits.report, context.folder)
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
        threads = f", {base['n_threads']} thread{'s' if base['n_threads'] > 1 else ''}" if base["n_threads"] else ""
        times, where = (_milliseconds(base), _milliseconds(pruned)), f"{runtime}, {base['device']}{threads}"
        rows.append((f"latency, batch {batch}, {where}", *times, speed_change(base, pruned)))
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
    said = [*target_sentences(metrics), *([sentence] if (sentence := finetune_sentence(metrics)) else [])]
    metric, latency = display_name(metrics.get("metric")), metrics.get("latency", [])
    said += [_written(each, metric, latency) for each in metrics.get("exports", [])]
    return [*said, *metrics.get("advice", []), *(f"{name}: {why}" for name, why in failed.items())]


def _written(export: Mapping[str, Any], metric: str, latency: Sequence[Mapping[str, Any]]) -> str:
    if export["kind"] == INT8:
        return int8_sentence(export, metric) + int8_times(latency)
    difference = f"{export['largest_difference']:.0e} of the largest output"
    return f"{export['file']}: {export['kind']}, largest difference {difference}."


def where_it_runs(metrics: Mapping[str, Any], folder: str, own_network: bool) -> list[str]:
    """What is fastest on this device, each with the line that runs it so, and what was not timed."""
    exported = [each["kind"] for each in metrics.get("exports", [])]
    latency, said = metrics.get("latency", []), []
    if len({(each["model"], each.get("runtime")) for each in latency}) > 2:
        for sentence, record in fastest_ways(latency):
            said += [sentence, f"  {code_of(record, folder, own_network, exported)}"]
    left = not_timed_sentence(metrics.get("latency_not_timed", {}))
    return [*said, left] if left else said


def write_results(metrics: Mapping[str, Any], folder: RunFolder, command: str = "prune") -> None:
    """`report.md`, then `metrics.json`, whose presence says that the run is complete."""
    folder.write_text("report.md", markdown_report(metrics, folder, command))
    folder.write_json(METRICS, metrics)


def show_results(metrics: Mapping[str, Any], context: RunContext) -> None:
    """The final tables and warnings."""
    terminal = context.terminal
    terminal.layers(metrics["groups"])
    terminal.totals(total_rows(metrics))
    show_remarks(metrics, context)
    if text := bound_sentence(metrics):
        terminal.warn(text)


def show_remarks(metrics: Mapping[str, Any], context: RunContext) -> None:
    """Below the tables: what a reader has to know beside the figures, and what is fastest here."""
    own = not str(context.config.network.get("_target_", "")).startswith(BUILT_IN)
    for sentence in [*remarks(metrics), *where_it_runs(metrics, context.folder.place, own)]:
        context.terminal.console.print(sentence, markup=False)
