"""The curve of an iterated pruning: accuracy against MACs, step by step, as JSON, CSV and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from ...envs.data.objective import display_name
from ...envs.task import PruningTask
from ..runs.console import Terminal
from ..runs.figures import can_plot, svg_figure
from ..runs.folder import RunFolder

COLUMNS = ("step", "n_filters", "macs", "params", "accuracy")


def write_curve(
    records: Sequence[Mapping[str, Any]], task: PruningTask, folder: RunFolder, terminal: Terminal, config: DictConfig
) -> None:
    """`curve.json` (with what is left after each step), `curve.csv`, and `curve.svg` where matplotlib is installed.

    Accuracies are fractions on the reward split, after the minibatches of each step.
    """
    base = {"accuracy": task.base.accuracy, "macs": task.base.cost.macs, "params": task.base.cost.params}
    points = [{name: record[name] for name in (*COLUMNS, "left")} for record in records]
    folder.write_json("curve.json", {"criterion": config.criterion, "base": base, "points": points})
    folder.write_text("curve.csv", as_csv(records))
    if can_plot(terminal):
        folder.write_text("curve.svg", picture(points, base, config.criterion, display_name(task.objective.name)))


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([record[name] for name in COLUMNS] for record in records)
    return text.getvalue()


def picture(points: Sequence[Mapping[str, Any]], base: Mapping[str, Any], criterion: str, metric: str) -> str:
    """An SVG of accuracy, which is the `metric`, against MACs."""
    with svg_figure(6, 4) as (figure, text):
        axes = figure.subplots()
        axes.plot([p["macs"] / 1e6 for p in points], [100 * p["accuracy"] for p in points], marker="o", markersize=3)
        axes.axhline(100 * base["accuracy"], color="grey", linewidth=0.8)
        axes.set_xlabel("million MACs per image")
        axes.set_ylabel(f"{metric} on the reward split (%)")
        axes.set_title(f"iterate, {criterion}")
        axes.grid(alpha=0.3)
    return text.getvalue()
