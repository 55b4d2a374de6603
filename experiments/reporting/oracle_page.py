"""The page of `keepdrop oracle`: how well criteria and agents foresee what a filter is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..oracle.correlations import AGENT, ORACLES, TITLES, table
from .charts import signed_bar
from .markup import Markup, join, page, section, tag
from .markup import table as table_of
from .run_data import Run
from .sections import origin

EXPLAINED = {
    "absolute_loss": "The oracle of Molchanov et al. (2017): a filter matters if the loss changes without it.",
    "loss": "A filter matters if the loss rises without it.",
    "accuracy": "A filter matters if images are lost without it; with few images many filters are equal.",
}


def oracle_page(run: Run) -> str:
    """`report.html` of an oracle."""
    unfinished = tag("p", "This run is unfinished; tables come at its end.", class_="note")
    return page(
        f"{run.name} - keepdrop oracle",
        tag("header", tag("h1", run.name), tag("p", "keepdrop oracle", class_="soft")),
        _finished(run.metrics) if run.metrics else unfinished,
        origin(run),
    )


def _finished(metrics: Mapping[str, Any]) -> Markup:
    n_filters = sum(len(layer["loss_change"]) for layer in metrics["layers"].values())
    lead = f"{n_filters:,} filters, each removed alone, on {metrics['n_images']:,} images of the reward split."
    first = _ordered(metrics, ORACLES[0])
    if first:
        lead += f" {first[0]['method']} foresees best what that costs: {first[0]['mean']:.2f} over the layers."
    return join((tag("p", lead, class_="lead"), *(_section(metrics, oracle) for oracle in ORACLES)))


def _ordered(metrics: Mapping[str, Any], oracle: str) -> list[Mapping[str, Any]]:
    """Rows of one oracle that have a mean over the layers, the highest first."""
    rows = [row for row in metrics["correlations"] if row["oracle"] == oracle and row["mean"] is not None]
    return sorted(rows, key=lambda row: -row["mean"])


def _section(metrics: Mapping[str, Any], oracle: str) -> Markup | None:
    """Bars of the mean over the layers, and the table layer by layer."""
    rows = _ordered(metrics, oracle)
    ends = (min(0.0, *(row["mean"] for row in rows)), 1.0) if rows else (0.0, 1.0)
    lines = []
    for row in rows:
        name, style = row["method"], AGENT if row["method"] == AGENT else "other"
        lines += [tag("div", tag("b", name) if name == AGENT else name, class_="name")]
        lines += [signed_bar(name, row["mean"], ends, style), tag("div", _minus(f"{row['mean']:.2f}"))]
    header, body = table(metrics, oracle)
    cells = [[name, *map(_minus, rest)] for name, *rest in body]
    caption = "mean: over the layers; all filters: ranked together. 1 is the same order, 0 is chance."
    bars = tag("div", *lines, class_="bars") if lines else None
    return section(TITLES[oracle], EXPLAINED[oracle], bars, tag("p", caption, class_="soft"), table_of(header, cells))


def _minus(text: str) -> str:
    """With a minus as long as a plus; a lone dash stays: there is no value."""
    return text if text == "-" else text.replace("-", "\N{MINUS SIGN}")
