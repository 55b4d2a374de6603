"""Draw what `benchmarks/evaluation.py` measured: speed over naive for each group beside what the prefix alone allows.

python benchmarks/plot_evaluation.py benchmarks/results/*.json --out docs/assets/evaluation.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """One panel a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(options.files), figsize=(4 * len(options.files), 3.2), squeeze=False)
    for axes, file in zip(panels[0], options.files, strict=True):
        found = json.loads(file.read_text())
        places = range(len(found["groups"]))
        axes.bar(places, [row["ratio"] for row in found["groups"]], color="#2a9d8f", label="measured")
        axes.plot(places, [row["limit"] for row in found["groups"]], "k_", label="prefix alone")
        axes.set_yscale("log")
        title = " ".join([found["network"], *([found["dtype"]] if "gpu" in found else [])])
        axes.set_title(f"{title}: {found['geometric_mean']:.2f} x (geometric mean)", fontsize=9)
        axes.set_xlabel("group, low to high", fontsize=8)
        axes.set_ylabel("times as fast as naive", fontsize=8)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
