"""What a comparison found, as tables (terminal, Markdown, CSV, JSON) and plots."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from ...envs.data.objective import display_name
from ...envs.evaluation.mask_evaluator import accuracy_on
from ..runs.console import Terminal
from ..runs.folder import METRICS, RunFolder
from .choices import Choices
from .measuring import result_name
from .methods import AGENT
from .plan import Job
from .plot import plot

STAGE_TITLES = {
    "zero": "before any training",
    "bn": "after batch-norm recalibration",
    "one": "after 1 epoch",
    "full": "after the full schedule",
}
NO_SCIPY = "scipy is not installed, so there are no p-values: pip install keepdrop[stats]"


def summary(choices: Choices, jobs: Sequence[Job], config: DictConfig, folder: RunFolder) -> dict[str, Any]:
    """What `metrics.json` holds: a row for each method, target and compensation; accuracies are fractions.

    `no_p_values` says why there are none, where they could be.
    """
    task = choices.task
    rows, skipped = [], []
    for cell, its_jobs in _cells(jobs):
        records = [(job, choices.record(job)) for job in its_jobs]
        skipped += [{"job": job.label, "reason": record["skipped"]} for job, record in records if "skipped" in record]
        done = [(job, record) for job, record in records if "skipped" not in record]
        if done:
            rows.append(cell | _row(done, list(config.stages), folder))
    versus = [each for stage in config.stages for each in versus_agent(rows, stage)]
    return {
        "metric": task.objective.name,
        "base_accuracy": accuracy_on(task.model, task.splits.report),
        "base_reward_accuracy": task.base.accuracy,
        "base_macs": task.base.cost.macs,
        "base_params": task.base.cost.params,
        "layers": {group.name: group.n_filters for group in task.groups},
        "targets_of": config.targets.of,
        "stages": list(config.stages),
        "rows": rows,
        "agent_minus_others": versus,
        "no_p_values": NO_SCIPY if not _has_scipy() and any(len(each["seeds"]) > 1 for each in versus) else None,
        "skipped": skipped,
    }


def _cells(jobs: Sequence[Job]) -> Iterator[tuple[dict[str, Any], list[Job]]]:
    """Jobs that differ in nothing but their seed."""
    cells: dict[tuple[str, float, bool], list[Job]] = {}
    for job in jobs:
        cells.setdefault((job.method, job.removed, job.compensate), []).append(job)
    for (method, removed, compensate), found in cells.items():
        yield {"method": method, "removed": removed, "compensate": compensate}, found


def _row(done: Sequence[tuple[Job, Mapping[str, Any]]], stages: Sequence[str], folder: RunFolder) -> dict[str, Any]:
    records = [record for _, record in done]
    row: dict[str, Any] = {
        "seeds": [job.seed for job, _ in done],
        "macs_removed": mean(record["macs_removed"] for record in records),
        "network_macs": mean(record["network_macs"] for record in records),
        "macs_by_seed": [record["network_macs"] for record in records],
        "network_params": mean(record["network_params"] for record in records),
        "n_kept": [record["n_kept"] for record in records],
        "choice_seconds": mean(record["seconds"] for record in records),
        "mask_evaluations": [record["facts"].get("mask_evaluations", 0) for record in records],
        "stages": {},
    }
    for stage in stages:
        results = [folder.read_json(result_name(job, stage)) for job, _ in done]
        row["stages"][stage] = {
            role: _spread([result[f"{role}_accuracy"] for result in results]) for role in ("report", "reward")
        }
    return row


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value), and the values, seed by seed."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "values": list(values)}


def versus_agent(rows: Sequence[Mapping[str, Any]], stage: str) -> list[dict[str, Any]]:
    """The agent's report accuracy minus every other method's, seed by seed, with a paired t-test over the seeds.

    `p_value` is two-sided; None with fewer than two common seeds, differences that are all equal, or without scipy.
    """
    agents = {(row["removed"], row["compensate"]): row for row in rows if row["method"] == AGENT}
    found = []
    for row in rows:
        agent = agents.get((row["removed"], row["compensate"]))
        if agent is None or row is agent:
            continue
        ours, theirs = (
            dict(zip(each["seeds"], each["stages"][stage]["report"]["values"], strict=True)) for each in (agent, row)
        )
        seeds = [seed for seed in ours if seed in theirs]
        gaps = [ours[seed] - theirs[seed] for seed in seeds]
        where = {key: row[key] for key in ("method", "removed", "compensate")} | {"stage": stage}
        found.append(where | {"seeds": seeds, "difference": _spread(gaps), "p_value": paired_p(gaps)})
    return found


def paired_p(gaps: Sequence[float]) -> float | None:
    """Two-sided p of a paired t-test that the mean of `gaps` is 0; None without a spread to test with, or scipy."""
    if len(gaps) < 2 or max(gaps) - min(gaps) < 1e-12 or not _has_scipy():
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(gaps, 0.0).pvalue)


def _has_scipy() -> bool:
    return importlib.util.find_spec("scipy") is not None


@dataclass(frozen=True)
class Grid:
    """One table: the methods at one stage, with or without compensation, a column for each target."""

    title: str
    header: list[str]
    rows: list[list[str]]


def grids(metrics: Mapping[str, Any]) -> list[Grid]:
    """All tables of a comparison: accuracies in percent on the report split."""
    found = []
    for compensate in dict.fromkeys(row["compensate"] for row in metrics["rows"]):
        rows = [row for row in metrics["rows"] if row["compensate"] == compensate]
        targets = list(dict.fromkeys(row["removed"] for row in rows))
        for stage in metrics["stages"]:
            how = "with" if compensate else "without"
            title = f"{STAGE_TITLES[stage]}, {how} compensation".capitalize()
            header = ["method", *(f"{100 * removed:g} % removed" for removed in targets)]
            methods = dict.fromkeys(row["method"] for row in rows)
            lines = [[name, *(_cell(rows, name, removed, stage) for removed in targets)] for name in methods]
            found.append(Grid(title, header, lines))
    return found


def _cell(rows: Sequence[Mapping[str, Any]], method: str, removed: float, stage: str) -> str:
    row = next((row for row in rows if row["method"] == method and row["removed"] == removed), None)
    if row is None:
        return "-"
    found = row["stages"][stage]["report"]
    spread = "" if found["std"] is None else f" +- {100 * found['std']:.2f}"
    return f"{100 * found['mean']:.2f}{spread}"


def headline(metrics: Mapping[str, Any]) -> str:
    """What the tables are about, in one sentence."""
    whose = {"groups": "the pruned layers' own MACs", "network": "the network's MACs"}[metrics["targets_of"]]
    seeds = max(len(row["seeds"]) for row in metrics["rows"])
    metric, base = display_name(metrics.get("metric"), opens=True), f"{100 * metrics['base_accuracy']:.2f}"
    return (
        f"{metric} in percent on the report split (base {base}), mean +- standard "
        f"deviation over up to {seeds} seeds; targets are fractions of {whose}."
    )


def markdown(metrics: Mapping[str, Any]) -> str:
    """`report.md`."""
    lines = ["# keepdrop compare", "", headline(metrics)]
    for grid in grids(metrics):
        lines += ["", f"## {grid.title}", "", f"| {' | '.join(grid.header)} |"]
        lines += ["|" + "---|" + "---:|" * (len(grid.header) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in grid.rows]
    lines += [f"\n{each}." for each in left_out(metrics["skipped"])]
    return "\n".join(lines) + "\n"


def left_out(skipped: Sequence[Mapping[str, str]]) -> list[str]:
    """A line for each method and reason: the job that was left out, or how many."""
    jobs: dict[tuple[str, str], list[str]] = {}
    for each in skipped:
        jobs.setdefault((each["job"].partition(",")[0], each["reason"]), []).append(each["job"])
    return [
        f"{found[0] if len(found) == 1 else f'{method} ({len(found)} jobs)'}: left out, {reason}"
        for (method, reason), found in jobs.items()
    ]


def csv_table(metrics: Mapping[str, Any]) -> str:
    """`table.csv`: one line for each method, target, compensation and stage; accuracies are fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", "removed", "compensate", "stage", "n_seeds", "macs_removed", "network_macs", "network_params"]
        + [f"{role}_{what}" for role in ("report", "reward") for what in ("mean", "std")]
    )
    for row in metrics["rows"]:
        for stage, found in row["stages"].items():
            where = [row["method"], row["removed"], row["compensate"], stage, len(row["seeds"])]
            cost = [row["macs_removed"], row["network_macs"], row["network_params"]]
            writer.writerow(where + cost + [found[r][w] for r in ("report", "reward") for w in ("mean", "std")])
    return text.getvalue()


def write_all(metrics: Mapping[str, Any], folder: RunFolder, terminal: Terminal) -> None:
    """Tables and plots, then `metrics.json`, whose presence says that the run is complete."""
    folder.write_text("report.md", markdown(metrics))
    folder.write_text("table.csv", csv_table(metrics))
    plot(metrics, folder, terminal, STAGE_TITLES)
    if metrics["no_p_values"]:
        terminal.warn(metrics["no_p_values"])
    folder.write_json(METRICS, metrics)


def show(metrics: Mapping[str, Any], terminal: Terminal) -> None:
    """The tables on the terminal."""
    for grid in grids(metrics):
        table = Table(title=grid.title, title_justify="left")
        table.add_column(grid.header[0])
        for name in grid.header[1:]:
            table.add_column(name, justify="right")
        for row in grid.rows:
            table.add_row(*row)
        terminal.console.print(table)
    terminal.console.print(headline(metrics), markup=False)
    for each in left_out(metrics["skipped"]):
        terminal.warn(each)
