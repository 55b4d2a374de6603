"""A page on which several runs stand side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...envs.data.objective import display_name
from ..deploy.latency import paired
from .cards import change, final_accuracy, percent, points, speed
from .charts import Axis, Series, line_chart
from .markup import Markup, fold, page, section, table, tag
from .run_data import Run, original_masks

STYLES = ("first", "second", "third", "fourth")
IGNORED = {"run_dir", "resume", "quiet"}


def comparison_page(runs: Sequence[Run]) -> str:
    """The comparison of two or more runs."""
    names = unique_names(runs)
    return page(
        "keepdrop: comparison",
        tag("header", tag("h1", f"{len(runs)} runs side by side"), tag("p", ", ".join(names), class_="soft")),
        _unfinished(runs, names),
        _comparable(runs, names),
        _trade_off(runs, names),
        _totals(runs, names),
        _layers(runs, names),
        _differences(runs, names),
    )


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Folder names, with as much of the path as tells them apart."""
    depth = 1
    while depth < 20:
        names = ["/".join(run.path.resolve().parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            return names
        depth += 1
    return [str(run.path) for run in runs]


def _unfinished(runs: Sequence[Run], names: Sequence[str]) -> Markup | None:
    waiting = [name for run, name in zip(runs, names, strict=True) if not run.finished]
    return tag("p", f"Unfinished, so without final figures: {', '.join(waiting)}.", class_="note") if waiting else None


def _comparable(runs: Sequence[Run], names: Sequence[str]) -> Markup | None:
    """Says so where runs were evaluated on different images."""
    hashes = {run.split("report").get("sha256") for run in runs}
    if len(hashes - {None}) <= 1:
        return None
    text = "These runs have different report splits, so their accuracies were measured on different images."
    return tag("p", text, class_="note")


def _trade_off(runs: Sequence[Run], names: Sequence[str]) -> Markup | None:
    """Final accuracy against the MACs that are left; one point per run."""
    series = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        metrics = run.metrics or {}
        last = final_accuracy(metrics)
        if last is not None and metrics.get("base_macs") and metrics.get("pruned_macs"):
            at = 100 * metrics["pruned_macs"] / metrics["base_macs"]
            series.append(Series(name, [(at, 100 * last)], STYLES[i % len(STYLES)], line=False))
    if not series:
        return None
    words = "; ".join(
        f"{each.name}: {each.points[0][1]:.2f} % at {each.points[0][0]:.1f} % of the MACs" for each in series
    )
    name = _metric(runs)
    x, y = Axis("MACs left, % of the base", "{:g}".format, falling=True), Axis(f"{name}, %", "{:g}".format, most=100)
    plot = line_chart(f"{name} against MACs", f"{name} on the report split. {words}.", series, x, y)
    return section(f"{name} against MACs", "After fine-tuning, on the report split.", tag("figure", plot))


def _totals(runs: Sequence[Run], names: Sequence[str]) -> Markup | None:
    head = ["run", "command", "base", "pruned", "fine-tuned", "vs. the base", "MACs", "parameters", "latency"]
    rows = [[name, run.command, *_figures(run.metrics or {})] for run, name in zip(runs, names, strict=True)]
    text = f"{_metric(runs)} on the report split; latency at the largest batch measured."
    return section("Figures", text, table(head, rows))


def _metric(runs: Sequence[Run]) -> str:
    """What the runs' accuracies are; all their names, where they differ."""
    return (
        " or ".join(dict.fromkeys(display_name(run.metric, opens=True) for run in runs if run.finished)) or "Accuracy"
    )


def _figures(metrics: Mapping[str, Any]) -> list[str]:
    accuracies = [metrics.get(f"{state}_accuracy") for state in ("base", "pruned", "finetuned")]
    last, base = final_accuracy(metrics), accuracies[0]
    amounts = [(metrics.get(f"base_{key}"), metrics.get(f"pruned_{key}")) for key in ("macs", "params")]
    return [
        *("-" if one is None else percent(one) for one in accuracies),
        "-" if last is None or base is None else points(last - base),
        *(change(before, after) if before and after is not None else "-" for before, after in amounts),
        _latency(metrics.get("latency") or []),
    ]


def _latency(records: Sequence[Mapping[str, Any]]) -> str:
    """Of the largest batch, in the runtime that was measured first."""
    measured = paired(records)
    if not measured:
        return "-"
    first, largest = next(iter(measured))[0], max(batch for _, batch in measured)
    both = measured.get((first, largest))
    return speed(*both) if both else "-"


def _layers(runs: Sequence[Run], names: Sequence[str]) -> Markup | None:
    """Filters kept, one row per layer and one column per run."""
    masks = [original_masks(run) for run in runs]
    layers = list(dict.fromkeys(name for each in masks for name in each))
    rows = [[layer, *(_kept(each.get(layer)) for each in masks)] for layer in layers]
    return section("Filters kept in each layer", None, table(["layer", *names], rows)) if rows else None


def _kept(mask: Sequence[bool] | None) -> str:
    return "-" if mask is None else f"{sum(mask)} of {len(mask)} ({100 * sum(mask) / len(mask):.0f} %)"


def _differences(runs: Sequence[Run], names: Sequence[str]) -> Markup | None:
    """Settings that are not the same in all runs."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if key not in IGNORED]
    rows = [[key, *(each.get(key, "-") for each in flat)] for key in keys if len({each.get(key) for each in flat}) > 1]
    if not rows:
        return section("Settings", None, tag("p", "All runs have the same settings."))
    return section("Settings that differ", None, fold(f"{len(rows)} settings", table(["setting", *names], rows)))


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
