"""The page of `keepdrop compare`: every method at every target, the agent in front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from statistics import mean
from typing import Any

from ...envs.data.objective import display_name
from ..compare.methods import AGENT, FOLLOWS
from ..compare.tables import STAGE_TITLES, Grid, grids, headline, left_out
from ..runs.console import signed
from .cards import card, percent, points
from .charts import Axis, Series, bar, gauge, heights, line_chart, span
from .markup import Markup, fold, join, page, section, table, tag
from .run_data import Run
from .sections import kept_key, learning_curve, origin, printed

Row = Mapping[str, Any]
SHOWN = 12  # rows of a table that need not be opened
LANDMARKS = {"random-uniform": "random", "torch-pruning": "base"}  # drawn in a colour of their own beside the best


def methods_page(run: Run) -> str:
    """`report.html` of a comparison; tables and plots once it is finished."""
    metrics = run.metrics
    done = [_finished(metrics)] if metrics else [_unfinished(run)]
    return page(
        f"{run.name} - keepdrop compare",
        tag("header", tag("h1", run.name), tag("p", "keepdrop compare", class_="soft")),
        *done,
        _searches(run),
        _cost(metrics["rows"]) if metrics else None,
        printed(run, [f"accuracy-{stage}" for stage in (run.metrics or {}).get("stages") or []]),
        origin(run),
    )


def _unfinished(run: Run) -> Markup:
    agents = f"{len(run.searches)} agent{'s' * (len(run.searches) != 1)} trained so far"
    return tag("p", f"This run is unfinished: {agents}. Tables come at its end.", class_="note")


def _finished(metrics: Mapping[str, Any]) -> Markup:
    parts = [
        tag("p", headline(metrics).replace("+-", "±"), class_="lead"),
        *(tag("p", f"{each}.", class_="note") for each in left_out(metrics["skipped"])),
        _cards(metrics),
        *(_stage(metrics, stage, compensate) for compensate, stage in product(_settings(metrics), metrics["stages"])),
        _leads(metrics),
        _kept(metrics),
    ]
    return join(parts)


def _settings(metrics: Mapping[str, Any]) -> list[bool]:
    return list(dict.fromkeys(row["compensate"] for row in metrics["rows"]))


def _targets(metrics: Mapping[str, Any]) -> list[float]:
    return sorted({row["removed"] for row in metrics["rows"]})


def _how(compensate: bool) -> str:
    return "with compensation" if compensate else "without compensation"


def _rows(metrics: Mapping[str, Any], compensate: bool, removed: float | None = None) -> list[Row]:
    return [
        row
        for row in metrics["rows"]
        if row["compensate"] == compensate and (removed is None or row["removed"] == removed)
    ]


def _mean(row: Row, stage: str) -> float:
    return float(row["stages"][stage]["report"]["mean"])


def best(rows: Sequence[Row], stage: str, follows: bool = False) -> Row | None:
    """The highest of the rows that know nothing of the agent, or of those that keep its counts."""
    others = [row for row in rows if row["method"] != AGENT and row["method"].endswith(FOLLOWS) == follows]
    return max(others, key=lambda row: _mean(row, stage), default=None)


def _cards(metrics: Mapping[str, Any]) -> Markup | None:
    """One card per target: how far the agent leads at the last stage."""
    stage, compensate = metrics["stages"][-1], _settings(metrics)[-1]
    found = []
    for removed in _targets(metrics):
        rows = _rows(metrics, compensate, removed)
        agent, other = next((row for row in rows if row["method"] == AGENT), None), best(rows, stage)
        if agent is not None and other is not None:
            lead = points(_mean(agent, stage) - _mean(other, stage))
            accuracies = f"agent {percent(_mean(agent, stage))}, {other['method']} {percent(_mean(other, stage))}"
            where = f"{STAGE_TITLES[stage]}, {_how(compensate)}"
            found.append(card(f"Lead at {100 * removed:g} % removed", lead, accuracies, where))
    return tag("div", *found, class_="cards") if found else None


def _stage(metrics: Mapping[str, Any], stage: str, compensate: bool) -> Markup | None:
    """Plot and table of one stage."""
    title = f"{STAGE_TITLES[stage]}, {_how(compensate)}".capitalize()
    grid = next(each for each in grids(metrics) if each.title == title)
    rows = _rows(metrics, compensate)
    many = len({row["removed"] for row in rows}) > 1
    if many:
        values = _table(grid)
        values = fold("All methods as a table", values) if len(grid.rows) > SHOWN else values
        return section(grid.title, None, tag("figure", _lines(metrics, rows, stage)), values)
    return section(grid.title, None, tag("figure", _ranking(rows, stage)), fold("As a table", _table(grid)))


def _table(grid: Grid) -> Markup:
    """The figures, the agent's and the highest of each column in bold."""
    columns = list(zip(*grid.rows, strict=True))[1:]
    highest = [max((float(cell.split()[0]) for cell in column if cell != "-"), default=None) for column in columns]

    def shown(cell: str, top: float | None) -> Markup | str:
        text = cell.replace("+-", "±")
        return tag("b", text) if cell != "-" and float(cell.split()[0]) == top else text

    body = [
        [tag("b", name) if name == AGENT else name, *map(shown, cells, highest)]
        for name, *cells in grid.rows
    ]  # fmt: skip
    text = tag("p", "On the report split, %; the highest of each column in bold.", class_="soft")
    return join((text, table(grid.header, body)))


def _lines(metrics: Mapping[str, Any], rows: Sequence[Row], stage: str) -> Markup:
    """Accuracy against MACs: the agent, the best other one and landmarks in colour, all others in the background."""
    top = best([row for row in rows if row["removed"] == max(_targets(metrics))], stage)
    styles = dict(LANDMARKS)
    if top is not None:
        styles[top["method"]] = "l1"
    styles[AGENT] = "agent strong"
    names = list(dict.fromkeys(row["method"] for row in rows))
    front = [name for name in (AGENT, top["method"] if top else AGENT, *LANDMARKS) if name in names]
    front = list(dict.fromkeys(front))
    behind = [name for name in names if name not in front]
    series = [_line(name, rows, stage, metrics, styles.get(name, "faint")) for name in (*front, *behind)]
    key = series[: len(front)]
    if behind:
        key = [*key, Series(f"{len(behind)} more (some may lie below)", [], "faint")]
    ends = "; ".join(f"{each.name} ends at {each.points[-1][1]:.2f} %" for each in series)
    # Methods that break the network would leave no room to tell the others apart: they are in the table.
    low, high = span(heights(series[: len(front)]))
    high = min(max(high, max(heights(series)) + 0.03 * (high - low)), max(100.0, max(heights(series))))
    x = Axis("MACs left, % of the base", "{:g}".format, falling=True)
    y = Axis(f"{display_name(metrics.get('metric'))}, %", "{:g}".format, (low, high))
    title = f"{display_name(metrics.get('metric'), opens=True)} against MACs, {STAGE_TITLES[stage]}"
    return line_chart(title, f"Mean over the seeds, on the report split: {ends}.", series, x, y, key)


def _line(name: str, rows: Sequence[Row], stage: str, metrics: Mapping[str, Any], style: str) -> Series:
    own = sorted((row for row in rows if row["method"] == name), key=lambda row: -row["network_macs"])
    drawn = [(100 * row["network_macs"] / metrics["base_macs"], 100 * _mean(row, stage)) for row in own]
    spread = [100 * (row["stages"][stage]["report"]["std"] or 0.0) for row in own] if style != "faint" else []
    return Series(name, drawn, style, spread=spread)


def _ranking(rows: Sequence[Row], stage: str) -> Markup:
    """All methods at the only target, the highest first."""
    ordered = sorted(rows, key=lambda row: -_mean(row, stage))
    means = [100 * _mean(row, stage) for row in ordered]
    spreads = [100 * (row["stages"][stage]["report"]["std"] or 0.0) for row in ordered]
    low = min(a - b for a, b in zip(means, spreads, strict=True))
    high = max(a + b for a, b in zip(means, spreads, strict=True))
    ends = (low - 0.05 * (high - low), max(min(high + 0.05 * (high - low), 100.0), high))
    lines = []
    for row, value, spread in zip(ordered, means, spreads, strict=True):
        name = row["method"]
        style = AGENT if name == AGENT else "other"
        lines += [tag("div", tag("b", name) if name == AGENT else name, class_="name")]
        lines += [gauge(name, value, ends, spread, style), tag("div", f"{value:.2f}")]
    text = f"Mean (mark) and standard deviation over the seeds, on a scale from {ends[0]:.1f} to {ends[1]:.1f} %."
    return join((tag("div", *lines, class_="bars"), tag("figcaption", text)))


def _leads(metrics: Mapping[str, Any]) -> Markup | None:
    """How far the agent is above the best other method, target by target."""
    text = (
        "The other method is the best one, picked with hindsight by its accuracy on the report split. Differences are "
        "taken seed by seed, mean ± standard deviation; p is of a two-sided paired t-test."
    )
    titles = ("Over methods that know nothing of the agent", "Over methods that keep as many filters in every layer")
    found = [_lead_table(metrics, follows, title) for follows, title in zip((False, True), titles, strict=True)]
    missing = metrics.get("no_p_values")
    note = tag("p", f"{missing}.", class_="note") if missing and any(found) else None
    return section("The agent's lead", text, note, *found)


def _lead_table(metrics: Mapping[str, Any], follows: bool, title: str) -> Markup | None:
    rows = []
    for compensate, stage, removed in product(_settings(metrics), metrics["stages"], _targets(metrics)):
        cells = _against(metrics, best(_rows(metrics, compensate, removed), stage, follows), stage)
        if cells is not None:
            rows.append([f"{STAGE_TITLES[stage]}, {_how(compensate)}", f"{100 * removed:g} %", *cells])
    head = ["when", "removed", "other method", "lead, points", "p"]
    return join((tag("p", title, class_="soft"), table(head, rows))) if rows else None


def _against(metrics: Mapping[str, Any], row: Row | None, stage: str) -> list[str] | None:
    """Name, difference and p of one other method."""
    same = ("method", "removed", "compensate")
    found = (
        each
        for each in metrics["agent_minus_others"]
        if row is not None and each["stage"] == stage and all(each[key] == row[key] for key in same)
    )
    gap = next(found, None)
    if gap is None:
        return None
    spread = gap["difference"]["std"]
    text = signed(100 * gap["difference"]["mean"]) + ("" if spread is None else f" ± {100 * spread:.2f}")
    p_value = gap["p_value"]
    return [gap["method"], text.replace("-", "\N{MINUS SIGN}"), "-" if p_value is None else f"{p_value:.3f}"]


def _kept(metrics: Mapping[str, Any]) -> Markup | None:
    """What the agent keeps of each layer, one block per target; the mean over its seeds."""
    agents = [row for row in metrics["rows"] if row["method"] == AGENT]
    widths = metrics.get("layers") or {}  # a run of an earlier version does not say how wide its layers are
    if not agents:
        return None
    text = "Filters, mean over the seeds." + (" Bars are as long as the layer has filters." if widths else "")
    blocks = [_block(row, widths, len(_settings(metrics)) > 1) for row in agents] if widths else []
    titles = [f"{100 * row['removed']:g} %, {_how(row['compensate'])}" for row in agents]
    layers = list(agents[0]["n_kept"][0])
    body = [[name, *([widths[name]] if widths else []), *(_range(row, name) for row in agents)] for name in layers]
    figures = table(["layer", *(["filters"] if widths else []), *titles], body)
    key = tag("p", kept_key(), class_="soft") if widths else None
    shown = tag("div", *blocks, class_="many") if widths else None
    return section("What the agent keeps", text, key, shown, fold("As a table", figures) if widths else figures)


def _block(row: Row, widths: Mapping[str, int], several: bool) -> Markup:
    longest = max(widths.values())
    lines = []
    for name, width in widths.items():
        kept = round(mean(each[name] for each in row["n_kept"]), 1)
        lines += [tag("div", name, class_="name"), bar(f"Filters of {name}", kept, width, longest)]
        lines.append(tag("div", f"{100 * kept / width:.0f} %"))
    how = f", {_how(row['compensate'])}" if several else ""
    return tag("div", tag("h3", f"{100 * row['removed']:g} % removed{how}"), tag("div", *lines, class_="bars"))


def _range(row: Row, layer: str) -> str:
    """Mean and, where seeds differ, the least and the most."""
    counts = [each[layer] for each in row["n_kept"]]
    return f"{mean(counts):.1f} ({min(counts)} to {max(counts)})" if min(counts) < max(counts) else f"{counts[0]}"


def _searches(run: Run) -> Markup | None:
    """How each agent's reward rose."""
    curves = {key: curve for key, curve in run.searches.items() if curve}
    plots = [learning_curve(_title(key), curve, False) for key, curve in curves.items()]
    name = display_name(run.metric, opens=True)
    text = f"{name} of the masks of each update on the reward split: mean (solid) and the highest so far (dashed)."
    return section("What the agents learned", text, tag("div", *plots, class_="many")) if plots else None


def _title(key: str) -> str:
    """`0.7-compensated-seed0` for a person."""
    removed, how, seed = key.split("-")
    return f"{100 * float(removed):g} % removed, {_how(how == 'compensated')}, seed {seed.removeprefix('seed')}"


def _cost(rows: Sequence[Row]) -> Markup | None:
    """What choosing cost, by method."""
    body = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        masks = mean(each for row in own for each in row["mask_evaluations"])
        body.append([name, f"{mean(row['choice_seconds'] for row in own):.1f}", f"{masks:,.0f}"])
    values = fold("As a table", table(["method", "seconds per choice", "masks evaluated"], body))
    return section("What choosing cost", "Mean over targets and seeds, on the machine named below.", values)
