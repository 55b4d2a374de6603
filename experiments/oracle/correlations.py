"""How scores agree with the oracle: Spearman's rank correlation, by layer and over all filters, as tables.

Shapes: N filters.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ...agent.policies.features import ranks
from ..runs.console import Terminal
from ..runs.folder import METRICS, RunFolder

ORACLES = ("absolute_loss", "loss", "accuracy")
"""What a score should foresee: |change of the loss| (the paper's oracle), its rise, and the accuracy lost."""
RANDOM, AGENT, NETWORK_AGENT = "random-", "agent", "network agent"  # methods


def spearman(first: Tensor, second: Tensor) -> float | None:
    """Rank correlation of two (N,) tensors, equal values sharing their mean rank; None where one is constant."""
    a, b = ranks(torch.stack([first.double(), second.double()], dim=1)).T
    a, b = a - a.mean(), b - b.mean()
    spread = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / spread if spread > 0 else None


def importance(layer: Mapping[str, Any], oracle: str) -> Tensor:
    """(N,) of a layer: what each filter is worth by one of `ORACLES`, higher is more important."""
    loss, accuracy = (torch.tensor(layer[name], dtype=torch.float64) for name in ("loss_change", "accuracy_change"))
    return {"absolute_loss": loss.abs(), "loss": loss, "accuracy": -accuracy}[oracle]


def correlation_rows(layers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and oracle: correlation by layer, their mean, and over all filters together.

    Over all filters only methods with scores in every layer are compared. Random's row is the mean over its seeds.
    """
    names = list(dict.fromkeys(name for layer in layers.values() for name in layer["scores"]))
    rows = [_row(name, oracle, layers) for name in names for oracle in ORACLES]
    random = [row for row in rows if row["method"].startswith(RANDOM)]
    rows = [row for row in rows if not row["method"].startswith(RANDOM)]
    return rows + [_averaged([row for row in random if row["oracle"] == each]) for each in ORACLES if random]


def _row(name: str, oracle: str, layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    mine = {each: layer for each, layer in layers.items() if name in layer["scores"]}
    pairs = {
        each: (torch.tensor(layer["scores"][name], dtype=torch.float64), importance(layer, oracle))
        for each, layer in mine.items()
    }
    by_layer = {each: spearman(*pair) for each, pair in pairs.items()}
    known = [value for value in by_layer.values() if value is not None]
    together = [torch.cat(parts) for parts in zip(*pairs.values(), strict=True)]
    return {
        "method": name,
        "oracle": oracle,
        "layers": by_layer,
        "mean": mean(known) if known else None,
        "all": spearman(*together) if len(mine) == len(layers) else None,
    }


def _averaged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def average(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return mean(known) if known else None

    overall = [row["all"] for row in rows if row["all"] is not None]
    return {
        "method": "random",
        "oracle": rows[0]["oracle"],
        "layers": {name: average([row["layers"][name] for row in rows]) for name in rows[0]["layers"]},
        "mean": average([row["mean"] for row in rows]),
        "all": average(overall),
        "all_std": stdev(overall) if len(overall) > 1 else None,
    }


def table(metrics: Mapping[str, Any], oracle: str = ORACLES[0]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one oracle's table."""
    layers = list(metrics["layers"])
    rows = [
        [row["method"], *(_text(row["layers"].get(name)) for name in layers), _text(row["mean"]), _text(row["all"])]
        for row in metrics["correlations"]
        if row["oracle"] == oracle
    ]
    return ["method", *layers, "mean", "all filters"], rows


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


TITLES = {
    "absolute_loss": "Spearman correlation with the absolute change of the loss",
    "loss": "Spearman correlation with the rise of the loss",
    "accuracy": "Spearman correlation with the accuracy lost",
}


def markdown(metrics: Mapping[str, Any]) -> str:
    """`report.md`."""
    lines = ["# keepdrop oracle", "", f"Each filter removed alone, {metrics['n_images']} images of the reward split."]
    for oracle in ORACLES:
        header, rows = table(metrics, oracle)
        lines += ["", f"## {TITLES[oracle]}", "", f"| {' | '.join(header)} |"]
        lines += ["|" + "---|" + "---:|" * (len(header) - 1), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def csv_filters(metrics: Mapping[str, Any]) -> str:
    """`filters.csv`: one line per filter: its oracle and every score."""
    names = list(dict.fromkeys(name for layer in metrics["layers"].values() for name in layer["scores"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "filter", "loss_change", "accuracy_change", *names])
    for name, layer in metrics["layers"].items():
        for number, (loss, accuracy) in enumerate(zip(layer["loss_change"], layer["accuracy_change"], strict=True)):
            found = [layer["scores"][each][number] if each in layer["scores"] else "" for each in names]
            writer.writerow([name, number, loss, accuracy, *found])
    return text.getvalue()


def csv_correlations(metrics: Mapping[str, Any]) -> str:
    """`correlations.csv`: one line for each method and oracle."""
    layers = list(metrics["layers"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "oracle", *layers, "mean", "all"])
    for row in metrics["correlations"]:
        found = [row["layers"].get(name) for name in layers]
        writer.writerow([row["method"], row["oracle"], *found, row["mean"], row["all"]])
    return text.getvalue()


def write_all(metrics: Mapping[str, Any], folder: RunFolder) -> None:
    """Tables, then `metrics.json`, whose presence says that the run is complete."""
    folder.write_text("report.md", markdown(metrics))
    folder.write_text("filters.csv", csv_filters(metrics))
    folder.write_text("correlations.csv", csv_correlations(metrics))
    folder.write_json(METRICS, metrics)


def show(metrics: Mapping[str, Any], terminal: Terminal) -> None:
    """The table of the paper's oracle on the terminal."""
    header, rows = table(metrics)
    shown = Table(title=TITLES[ORACLES[0]], title_justify="left")
    shown.add_column(header[0])
    for name in header[1:]:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*row)
    terminal.console.print(shown)
