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
from ..runs.figures import can_plot, printed_figure
from ..runs.folder import RunFolder

COLUMNS = ("step", "n_filters", "macs", "params", "accuracy")


def write_curve(
    records: Sequence[Mapping[str, Any]], task: PruningTask, folder: RunFolder, terminal: Terminal, config: DictConfig
) -> None:
    """`curve.json` (with what is left after each step), `curve.csv`, and `curve.svg` and `curve.pdf` with matplotlib.

    Accuracies are fractions on the reward split, after the minibatches of each step.
    """
    base = {"accuracy": task.base.accuracy, "macs": task.base.cost.macs, "params": task.base.cost.params}
    points = [{name: record[name] for name in (*COLUMNS, "left")} for record in records]
    folder.write_json("curve.json", {"criterion": config.criterion, "base": base, "points": points})
    folder.write_text("curve.csv", as_csv(records))
    if can_plot(terminal):
        draw(points, base, config.criterion, display_name(task.objective.name), folder)


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([record[name] for name in COLUMNS] for record in records)
    return text.getvalue()


def draw(
    points: Sequence[Mapping[str, Any]], base: Mapping[str, Any], criterion: str, metric: str, folder: RunFolder
) -> None:
    """`curve.svg` and `curve.pdf`: accuracy, which is the `metric`, against MACs, one point per step."""
    with printed_figure(folder, "curve", 3.5, 2.6) as figure:
        axes = figure.subplots()
        axes.plot([p["macs"] / 1e6 for p in points], [100 * p["accuracy"] for p in points], "o-", label=criterion)
        axes.axhline(100 * base["accuracy"], color="grey", linewidth=0.6, label="dense")
        axes.set_xlabel("MACs per image (millions)")
        axes.set_ylabel(f"{metric} on the reward split (%)")
        axes.legend()
