"""The papers' own tables and the field's standard cells, row by row: what is to be run on a GPU, and what was.

    python benchmarks/cells.py vgg16 --data cifar10.npz --device cuda [--minutes 14] [--seeds 0 1 2]
    python benchmarks/cells.py resnet56 --data cifar10.npz --checkpoint resnet56.th --device cuda
    python benchmarks/cells.py vgg16-bounds --data cifar10.npz --device cuda      # and resnet18-bounds
    python benchmarks/cells.py resnet56 --table                                   # the table as far as it goes

A row is one `keepdrop` run in a folder of its own under `--runs`. What is finished is not started again; what was
interrupted is resumed; a run that lasts longer than `--minutes` is interrupted as by Ctrl-C, which loses an epoch at
most, and the same command resumes it. Results are saved after every row in `benchmarks/results/cells.json`. A table
shows "not run" for what is not there, with the published figures beside it: theirs carry the images and the coverage of
their papers, ours are on the report split of `--data`, which nothing was chosen on.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepdrop.experiments.config.cli_errors import known_keys

RESULTS = Path(__file__).parents[1] / "benchmarks/results/cells.json"
FIRST, STREAM, ALL = "first convolution of each block", "first convolutions and residual stream", "every convolution"
BOUNDS, NOT_RUN = (0.005, 0.01, 0.02), "not run"
# Accuracy of the dense network, of the pruned one (percent), MACs and parameters removed (percent), as published.
PUBLISHED: dict[str, list[tuple[str, float | None, float, int, int | None]]] = {
    "resnet56": [
        ("CORING", None, 94.22, 47, None),
        ("CHIP", 93.26, 94.16, 47, 43),
        ("DepGraph, sparse learning", 93.53, 93.77, 53, None),
        ("DepGraph, sparse learning", 93.53, 93.64, 61, None),
        ("OCSPruner", None, 93.65, 61, None),
        ("NORTON, with decomposition", None, 93.81, 71, None),
        ("CORING", None, 92.84, 72, None),
        ("CHIP", 93.26, 92.43, 74, 70),
    ],
    "vgg16": [
        ("CORING", None, 94.20, 67, None),
        ("CHIP", 93.96, 93.72, 67, 83),
        ("NORTON, with decomposition", None, 94.16, 68, None),
        ("NORTON, with decomposition", None, 94.11, 77, None),
        ("CORING", None, 93.83, 79, None),
        ("CHIP", 93.96, 93.18, 79, 87),
    ],
}
TABLES = ("resnet56", "vgg16", "vgg16-bounds", "resnet18-bounds")


@dataclass(frozen=True)
class Row:
    """One run of `keepdrop command arguments`; `needs` is the row whose network it starts from."""

    name: str
    command: str
    arguments: tuple[str, ...]
    coverage: str = ""
    needs: str | None = None


def rows_of(table: str, seeds: Sequence[int]) -> list[Row]:
    """The rows of a table in the order in which they are run."""
    if table.endswith("-bounds"):
        return _bounds(table.removesuffix("-bounds"), seeds)
    base = None if table == "resnet56" else _base(table)
    removed = (0.5, 0.6, 0.7) if table == "resnet56" else (0.67, 0.79)
    whole = FIRST if table == "resnet56" else ALL
    cells = [(share, "agent", None, whole) for share in removed]
    if table == "resnet56":
        cells += [(share, "agent", "layers=null", STREAM) for share in removed]
    cells += [(share, method, None, whole) for method in ("reconstruction", "random-uniform") for share in removed]
    rows = [base] if base else []
    for seed in seeds:
        for share, method, layers, coverage in cells:
            arguments = [f"experiment={table}_compare", f"targets.removed=[{share}]", f"methods=[{method}]"]
            arguments += [f"seeds=[{seed}]", "stages=[zero,full]", "workers=1", *([layers] if layers else [])]
            name = f"{table} {method} {100 * share:g} % seed {seed}" + (" stream" if layers else "")
            rows.append(Row(name, "compare", tuple(arguments), coverage, base.name if base else None))
    return rows


def _base(network: str) -> Row:
    return Row(f"{network} base", "train-cnn", (f"experiment={network}_base", "base.bf16=true"))


def _bounds(network: str, seeds: Sequence[int]) -> list[Row]:
    """Layer agents at the paper's drop bounds, the interleaved method at 50 and 70 %, the oracle's correlations."""
    base, coverage = _base(network), ALL if network == "vgg16" else FIRST
    rows = [base]
    for seed in seeds:
        for bound in BOUNDS:
            arguments = (f"experiment={network}_cifar10", f"drop_bound={bound}", f"seed={seed}")
            rows.append(Row(f"{network} bound {bound} seed {seed}", "prune", arguments, coverage, base.name))
        for share in (0.5, 0.7):
            arguments = (f"experiment={network}_iterate", f"target.removed={share}", f"seed={seed}")
            rows.append(
                Row(f"{network} iterate {100 * share:g} % seed {seed}", "iterate", arguments, coverage, base.name)
            )
    return [*rows, Row(f"{network} oracle", "oracle", (f"experiment={network}_oracle",), coverage, base.name)]


def folder_of(name: str, runs: Path) -> Path:
    """Where the run of the row of that name lies."""
    return runs / name.replace(" ", "-").replace("%", "percent")


def line_of(row: Row, options: argparse.Namespace) -> list[str]:
    """The command line that starts the row, or resumes it."""
    folder = folder_of(row.name, options.runs)
    start = [str(Path(sys.executable).with_name("keepdrop")), row.command]
    if (folder / "config.yaml").is_file():
        return [*start, f"resume={folder}"]
    arguments = [*row.arguments, f"data.path={options.data}", f"device={options.device}", f"run_dir={folder}"]
    if row.command != "train-cnn":
        checkpoint = folder_of(row.needs, options.runs) / "model.safetensors" if row.needs else options.checkpoint
        arguments.append(f"checkpoint={checkpoint}")
    known = known_keys(row.command.replace("-", "_"), arguments)
    if row.command != "train-cnn":  # a checkpoint brings a network that is trained already
        known = [key for key in known if not key.startswith("base.")]
    return [*start, *arguments, *(each for each in options.also if each.partition("=")[0] in known)]


def carried_out(row: Row, options: argparse.Namespace) -> bool:
    """Run the row for as long as it may; whether it is finished."""
    process = subprocess.Popen(line_of(row, options))
    try:
        code = process.wait(60 * options.minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        return False
    if code:
        raise SystemExit(f"{row.name!r} ended with code {code}; the same command resumes it")
    return True


def figures(row: Row, runs: Path) -> dict[str, Any]:
    """What a table needs of a finished run; accuracies are fractions on the report split."""
    folder = folder_of(row.name, runs)
    metrics, facts = (json.loads((folder / name).read_text()) for name in ("metrics.json", "facts.json"))
    split = (facts.get("splits") or {}).get("report") or {}
    found = {"coverage": row.coverage, "command": row.command, "report_images": split.get("n_images")}
    if row.command == "compare":
        (only,) = metrics["rows"]
        stages = {stage: each["report"]["mean"] for stage, each in only["stages"].items()}
        return {**found, "base": metrics["base_accuracy"], "macs_removed": only["macs_removed"], **stages}
    if row.command == "oracle":
        return {**found, "correlations": metrics["correlations"]}
    if row.command == "train-cnn":
        return {**found, "full": metrics["report_accuracy"]}
    kept = [(each["n_filters"], each["n_kept"]) for each in metrics["groups"]]
    return {
        **found,
        "base": metrics["base_accuracy"],
        "macs_removed": 1 - metrics["pruned_macs"] / metrics["base_macs"],
        "filters_removed": 1 - sum(left for _, left in kept) / sum(all_ for all_, _ in kept),
        "zero": metrics["pruned_accuracy"],
        "full": metrics["finetuned_accuracy"],
        "seconds": sum(metrics.get(f"{part}_seconds") or 0 for part in ("search", "recovery", "finetune")),
    }


def table_of(name: str, seeds: Sequence[int], results: Mapping[str, Any]) -> str:
    """The table in Markdown, published figures last."""
    head = ["row", "coverage", "report images", "MACs removed", "filters removed", "base", "pruned", "trained"]
    lines = [head, ["---", "---", *["---:"] * 6]]
    for row in rows_of(name, seeds):
        found = results.get(row.name)
        keys = ("macs_removed", "filters_removed", "base", "zero", "full")
        shown = [f"{100 * found[key]:.2f}" if found.get(key) is not None else "-" for key in keys] if found else []
        images = f"{found['report_images']:,}" if found and found.get("report_images") else "-"
        lines.append([row.name, row.coverage or "-", images, *(shown or [NOT_RUN, "-", "-", "-", "-"])])
    for who, base, accuracy, macs, _ in PUBLISHED.get(name, ()):
        lines.append(
            [f"{who} (published)", "theirs", "theirs", f"{macs}", "-", f"{base or '-'}", "-", f"{accuracy:.2f}"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run what is missing of one table, within the minutes of one step, and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TABLES)
    parser.add_argument("--data", help="cifar10.npz")
    parser.add_argument("--checkpoint", help="of resnet56; the others train their own")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=14.0, help="after which a step ends")
    parser.add_argument("--runs", type=Path, default=Path("runs/cells"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--also", nargs="*", default=[], help="settings, for the commands that have them")
    options = parser.parse_args()
    if not options.table and (not options.data or (options.name == "resnet56" and not options.checkpoint)):
        parser.error("--data is needed, and for resnet56 --checkpoint")
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    began = time.monotonic()
    for row in () if options.table else rows_of(options.name, options.seeds):
        if row.name in results:
            continue
        options.minutes -= (time.monotonic() - began) / 60
        began = time.monotonic()
        if options.minutes < 0.5 or not carried_out(row, options):
            break
        results[row.name] = figures(row, options.runs)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(results, indent=2) + "\n")
    print(table_of(options.name, options.seeds, results))


if __name__ == "__main__":
    main()
