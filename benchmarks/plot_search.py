"""Draw what `benchmarks/search.py` measured: seconds of a search against groups, filters, masks and images.

python benchmarks/plot_search.py benchmarks/results/search.json --out docs/assets/search.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

NAMES = {"layers": "layer by layer", "network": "whole network"}
AXES = {
    "groups": "filter groups",
    "filters": "filters of the narrowest group",
    "masks": "masks per update",
    "images": "reward images per mask",
}


def main() -> None:
    """One panel a sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = json.loads(options.file.read_text())
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(3 * len(AXES), 3), sharey=True)
    for axes, (axis, label) in zip(panels, AXES.items(), strict=True):
        for kind, name in NAMES.items():
            rows = found["sweeps"][kind][axis]
            values = [row["value"] for row in rows]
            middle = [row["thread_seconds"] for row in rows]
            spread = [[m - row["from"] for m, row in zip(middle, rows, strict=True)],
                      [row["to"] - m for m, row in zip(middle, rows, strict=True)]]  # fmt: skip
            axes.errorbar(values, middle, spread, marker="o", markersize=3, capsize=2, label=name)
        axes.set(xscale="log", yscale="log", xticks=values, xticklabels=values)
        axes.minorticks_off()
        axes.set_xlabel(label, fontsize=8)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"processor seconds, {found['updates']} updates", fontsize=8)
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
