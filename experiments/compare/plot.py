"""Figures of a comparison for print: accuracy against MACs with every method and seed, an SVG and a PDF per stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from ...envs.data.objective import display_name
from ..runs.console import Terminal
from ..runs.figures import COLOURS, can_plot, printed_figure
from ..runs.folder import RunFolder
from .methods import AGENT, FOLLOWS, PEERS

Row = Mapping[str, Any]
MARKERS = "osD^vPX"
FAMILIES = {"-uniform": ":", "-global": "-", "-global-mean": "-", FOLLOWS: "--", "-best": "-."}  # line by ending


def plot(metrics: Mapping[str, Any], folder: RunFolder, terminal: Terminal, titles: Mapping[str, str]) -> None:
    """Write `accuracy-STAGE.svg` and `.pdf` for every stage; a warning where matplotlib is missing."""
    if not can_plot(terminal):
        return
    for stage in metrics["stages"]:
        _draw_stage(metrics, stage, titles[stage], folder)


def _draw_stage(metrics: Mapping[str, Any], stage: str, title: str, folder: RunFolder) -> None:
    """A panel without and one with compensation: a line through each method's means, a dot for each seed."""
    settings = list(dict.fromkeys(row["compensate"] for row in metrics["rows"]))
    methods = list(dict.fromkeys(row["method"] for row in metrics["rows"]))
    with printed_figure(folder, f"accuracy-{stage}", 2.7 * len(settings) + 1.6, 3.0) as figure:
        panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
        for panel, compensate in zip(panels, settings, strict=True):
            rows = [row for row in metrics["rows"] if row["compensate"] == compensate]
            _draw(panel, rows, stage, metrics, methods)
            panel.set_title(f"{title}, {'with' if compensate else 'without'} compensation")
        panels[0].set_ylabel(f"{display_name(metrics.get('metric'))} on the report split (%)")
        panels[0].set_ylim(bottom=lowest_shown(metrics, stage))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")


def _draw(panel: Any, rows: Sequence[Row], stage: str, metrics: Mapping[str, Any], methods: Sequence[str]) -> None:
    for position, method in enumerate(methods):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["network_macs"])
        look, order = style(method, position), 4 if method == AGENT else 3
        means = [100 * row["stages"][stage]["report"]["mean"] for row in own]
        panel.plot([row["network_macs"] / 1e6 for row in own], means, label=method, zorder=order, **look)
        dots = list(_seeds(own, stage))
        if len(dots) > len(own):
            panel.plot(*zip(*dots, strict=True), ".", color=look["color"], markersize=2, alpha=0.6, zorder=order)
    panel.axhline(100 * metrics["base_accuracy"], color="grey", linewidth=0.6, label="dense")
    panel.set_xlabel("MACs per image (millions)")
    panel.grid(alpha=0.25, linewidth=0.4)


def _seeds(rows: Sequence[Row], stage: str) -> Iterator[tuple[float, float]]:
    """MACs in millions and accuracy in percent, seed by seed."""
    for row in rows:
        values = row["stages"][stage]["report"]["values"]
        macs = row.get("macs_by_seed") or [row["network_macs"]] * len(values)
        yield from ((each / 1e6, 100 * value) for each, value in zip(macs, values, strict=True))


def lowest_shown(metrics: Mapping[str, Any], stage: str) -> float:
    """Where the axis begins, in percent: networks that a cut broke would leave no room to tell the others apart.

    At the lowest of all points, but no further below the median than three times its distance from the base; what
    lies below is in the tables.
    """
    values = [100 * value for row in metrics["rows"] for value in row["stages"][stage]["report"]["values"]]
    base, middle = 100 * metrics["base_accuracy"], median(values)
    low, room = min(*values, base), max(base - middle, 1.0)
    return max(low - 0.08 * (base - low) - 0.1, middle - 3 * room, 0.0)


def style(method: str, position: int) -> dict[str, Any]:
    """How a method's line is drawn: one kind of line per family, the agent in black, no two alike among 49."""
    if method == AGENT:
        return {"color": "black", "linestyle": "-", "linewidth": 1.8, "marker": "o"}
    line = next((each for ending, each in FAMILIES.items() if method.endswith(ending)), "-")
    width = 1.3 if method in PEERS or "random" in method else 0.9
    marker = MARKERS[(position + position // len(COLOURS)) % len(MARKERS)]
    return {"color": COLOURS[position % len(COLOURS)], "linestyle": line, "linewidth": width, "marker": marker}
