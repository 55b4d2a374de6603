"""The table and the plot of `benchmarks/foresight.py`: rank correlations of cheap figures with the trained accuracy.

    python benchmarks/plot_foresight.py [benchmarks/results/foresight.json] [--against 400]

Spearman's rank correlation of every predictor with the accuracy of the dearest stage that enough allocations reached,
with a 95 % bootstrap interval over allocations (percentiles of 2,000 resamples). Draws docs/assets/foresight.svg
(matplotlib, extra `plots`) and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from keepdrop.experiments.oracle.correlations import spearman

ROOT = Path(__file__).parents[1]
RESULTS, PLOT = ROOT / "benchmarks/results/foresight.json", ROOT / "docs/assets/foresight.svg"
STAGES = ("cut", "repaired", "25", "100", "400", "full")
LABELS = {"cut": "as cut", "repaired": "repaired", "full": "full schedule"}
RESAMPLES = 2000


def label(stage: str) -> str:
    """For a person."""
    return LABELS.get(stage, f"{stage} minibatches")


def interval(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """The rank correlation and its 95 % bootstrap interval; nan where a figure is constant."""
    first, second = torch.tensor([x, y], dtype=torch.float64)
    drawn = torch.randint(len(x), (RESAMPLES, len(x)), generator=torch.Generator().manual_seed(0))
    found = [spearman(first[rows], second[rows]) for rows in (torch.arange(len(x)), *drawn)]
    rho, *resampled = np.array(found, dtype=float)
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return rho, low, high


def predictors(rows: Sequence[dict[str, Any]], before: str) -> dict[str, list[float]]:
    """Every figure known before a stage, oriented so that more should be better."""
    found: dict[str, list[float]] = {}
    for stage in STAGES[: STAGES.index(before)]:
        if all(stage in row for row in rows):
            found[f"accuracy, {label(stage)}"] = [row[stage]["accuracy"] for row in rows]
            found[f"loss, {label(stage)} (low)"] = [-row[stage]["loss"] for row in rows]
    found["parameters kept"] = [row["shape"]["params"] for row in rows]
    found["narrowest layer's share kept"] = [row["shape"]["narrowest"] for row in rows]
    found["mean depth of the cuts"] = [row["shape"]["mean_depth_of_cuts"] for row in rows]
    return found


def main() -> None:
    """Print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--against", default="400", choices=STAGES[1:])
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args()
    rows = [row for row in json.loads(options.json.read_text())["rows"].values() if options.against in row]
    targets = sorted({row["removed"] for row in rows})
    by_target = {removed: [row for row in rows if row["removed"] == removed] for removed in targets}
    for removed, some in by_target.items():
        print(
            f"\n{100 * removed:g} % removed, {len(some)} allocations, against accuracy after {label(options.against)}\n"
        )
        print("| predictor | rank correlation | 95 % interval |\n|---|---:|---|")
        trained = [row[options.against]["accuracy"] for row in some]
        for name, values in predictors(some, options.against).items():
            rho, low, high = interval(values, trained)
            print(f"| {name} | {rho:.2f} | {low:.2f} to {high:.2f} |")
    draw(by_target, options.against, options.plot)


def draw(by_target: dict[float, list[dict[str, Any]]], against: str, path: Path) -> None:
    """Trained accuracy over the repaired one, a panel for each target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(by_target), figsize=(5 * len(by_target), 4), squeeze=False)
    for axes, (removed, rows) in zip(panels[0], by_target.items(), strict=True):
        for kind in ("random", "criterion", "reconstruction", "agent"):
            some = [row for row in rows if kind_of(row["allocation"]) == kind]
            x = [100 * row["repaired"]["accuracy"] for row in some]
            axes.scatter(x, [100 * row[against]["accuracy"] for row in some], label=kind, s=22)
        axes.set_title(f"{100 * removed:g} % of the MACs removed", fontsize=10)
        axes.set_xlabel("accuracy repaired, no training (%)")
        axes.set_ylabel(f"after {label(against)} (%)")
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def kind_of(allocation: str) -> str:
    """How an allocation came about."""
    if allocation.startswith("random"):
        return "random"
    return allocation if allocation in ("agent", "reconstruction") else "criterion"


if __name__ == "__main__":
    main()
