"""Plots of a comparison: accuracy against MACs, one SVG per stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...envs.data.objective import display_name
from ..runs.console import Terminal
from ..runs.figures import can_plot, svg_figure
from ..runs.folder import RunFolder
from .methods import AGENT, FOLLOWS, PEERS

STYLES = {AGENT: ("black", "-", 2.5)}  # colour, line, width; the others by family below


def plot(metrics: Mapping[str, Any], folder: RunFolder, terminal: Terminal, titles: Mapping[str, str]) -> None:
    """Write `accuracy-STAGE.svg` for every stage; a warning where matplotlib is missing."""
    if not can_plot(terminal):
        return
    for stage in metrics["stages"]:
        folder.write_text(f"accuracy-{stage}.svg", picture(metrics, stage, titles[stage]))


def picture(metrics: Mapping[str, Any], stage: str, title: str) -> str:
    """The SVG of one stage: a panel without and one with compensation, a line for each method."""
    settings = list(dict.fromkeys(row["compensate"] for row in metrics["rows"]))
    with svg_figure(5.5 * len(settings) + 2, 5) as (figure, text):
        panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
        for panel, compensate in zip(panels, settings, strict=True):
            _draw(panel, [row for row in metrics["rows"] if row["compensate"] == compensate], stage, metrics)
            panel.set_title(f"{title}, {'with' if compensate else 'without'} compensation")
        panels[0].set_ylabel(f"{display_name(metrics.get('metric'))} on the report split (%)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return text.getvalue()


def _draw(panel: Any, rows: Sequence[Mapping[str, Any]], stage: str, metrics: Mapping[str, Any]) -> None:
    for position, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["network_macs"])
        colour, line, width = style(method, position)
        panel.errorbar(
            [row["network_macs"] / 1e6 for row in own],
            [100 * row["stages"][stage]["report"]["mean"] for row in own],
            yerr=[100 * (row["stages"][stage]["report"]["std"] or 0.0) for row in own],
            label=method,
            color=colour,
            linestyle=line,
            linewidth=width,
            marker="o",
            markersize=2 + width,
            zorder=3 if method == AGENT else 2,
        )
    panel.axhline(100 * metrics["base_accuracy"], color="grey", linewidth=0.8, label="base")
    panel.set_xlabel("million MACs per image")
    panel.grid(alpha=0.3)


def style(method: str, position: int) -> tuple[str, str, float]:
    """Colour, line style and width: one line style per family, the agent on top."""
    if method in STYLES:
        return STYLES[method]
    families = {"-uniform": ":", "-global": "-", FOLLOWS: "--", "-best": "-."}
    line = next((each for ending, each in families.items() if method.endswith(ending)), "-")
    return f"C{position % 10}", line, 2.0 if method in PEERS or "random" in method else 1.2
