"""The sections of a run's page. Each takes a `Run` and returns markup, or None where the run has nothing to show."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from ...envs.data.objective import display_name
from .cards import percent, standard_error
from .charts import Axis, Series, bar, line_chart, mini_chart, ranges, strip
from .markup import Markup, copyable, fold, join, section, table, tag
from .run_data import Layer, Run, original_masks

LABELS = {"l1": "L1", "l2": "L2", "apoz": "APoZ", "fpgm": "FPGM", "taylor": "Taylor", "bn_scale": "BN scale"}
STYLES = {"agent": "agent", "l1": "l1", "random": "random"}
AGENT = "agent"


def label(name: str) -> str:
    """A decider's name as it is displayed."""
    return LABELS.get(name, name.replace("_", " "))


def trade_off(run: Run) -> Markup | None:
    """Accuracy on the reward split against MACs, layer by layer, the controls beside the agent."""
    if run.steps:
        return _steps_of(run)
    lines = _accuracies(run)
    if not lines:
        return None
    x, steps = _steps(run)
    series = [
        Series(name, _drawn(steps, accuracies), style, spread=_chance(run, accuracies) if style == AGENT else ())
        for name, style, accuracies in lines
    ]
    ends = "; ".join(f"{each.name} ends at {each.points[-1][1]:.2f} %" for each in series)
    name = display_name(run.metric, opens=True)
    words = f"{name} on the reward split as one layer after the other is cut: {ends}."
    shown = [*series, *_bound(run, series[0].points)]
    plot = line_chart(f"{name} against MACs", words, shown, x, _percent_axis(run))
    rows = [
        [name, f"{steps[i]:.1f}", *(f"{each.points[i][1]:.2f}" if i < len(each.points) else "-" for each in series)]
        for i, name in enumerate(["base", *(layer.name for layer in run.layers)])
    ]
    head = ["after", x.label, *(f"{each.name}, %" for each in series)]
    figure = tag("figure", plot, fold("As a table", table(head, rows)))
    return section(f"{name} against MACs", _trade_off_text(run), figure)


def _steps_of(run: Run) -> Markup | None:
    """The curve of an iterated pruning: one point per step."""
    base, points = run.steps["base"], run.steps["points"]
    if not points:
        return None
    drawn = [(100 * point["macs"] / base["macs"], 100 * point["accuracy"]) for point in points]
    name = display_name(run.metric, opens=True)
    x, y = Axis("MACs left, % of the base", "{:g}".format, falling=True), _percent_axis(run)
    words = f"From {drawn[0][1]:.2f} % to {drawn[-1][1]:.2f} % over {len(drawn) - 1} steps."
    spread = _chance(run, [point["accuracy"] for point in points])
    series = Series(label(str(run.steps.get("criterion", "criterion"))), drawn, AGENT, spread=spread)
    plot = line_chart(f"{name} against MACs", words, [series, *_bound(run, drawn)], x, y)
    rows = [[p["step"], p["n_filters"], f"{a:.1f}", f"{b:.2f}"] for p, (a, b) in zip(points, drawn, strict=True)]
    values = fold("As a table", table(["step", "filters", x.label, y.label], rows))
    text = f"One point per step: the least important filters go, a little training follows. {name} on the reward split."
    return section(f"{name} against MACs", text + _chance_text(run), tag("figure", plot, values))


def printed(run: Run, names: Sequence[str]) -> Markup | None:
    """Links to figures for print, by name without ending, where matplotlib drew them."""
    files = [f"{name}.{kind}" for name in names for kind in ("svg", "pdf")]
    links = [tag("li", tag("a", name, href=name)) for name in files if (run.path / name).is_file()]
    text = "The same at the size of a page; the files lie beside this one."
    return section("Figures to print", text, tag("ul", *links)) if links else None


def _drawn(steps: Sequence[float], accuracies: Sequence[float]) -> list[tuple[float, float]]:
    return [(step, 100 * accuracy) for step, accuracy in zip(steps, accuracies, strict=False)]


def _percent_axis(run: Run) -> Axis:
    return Axis(f"{display_name(run.metric)}, %", "{:g}".format, most=100)


def _chance(run: Run, accuracies: Sequence[float]) -> list[float]:
    """One standard error of each accuracy on the reward split, in percentage points."""
    n_images = run.n_images("reward")
    return [100 * standard_error(each, n_images) for each in accuracies] if n_images else []


def _chance_text(run: Run) -> str:
    n_images = run.n_images("reward")
    if not n_images:
        return ""
    one = f"one image of {n_images:,} is {100 / n_images:.2f} points"
    return f" Vertical bars show one standard error ({one})."


def _bound(run: Run, points: Sequence[tuple[float, float]]) -> list[Series]:
    """The accuracy below which the drop bound is broken, where the run has one."""
    base, bound = (run.facts.get("base") or {}).get("reward_split_accuracy"), run.config.get("drop_bound")
    target = run.config.get("target") or {}
    unused = run.steps and target.get("removed") is not None and not target.get("hold_bound")
    if base is None or bound is None or unused:
        return []
    places, height = [x for x, _ in points], 100 * (base - bound)
    name = f"drop bound, {100 * bound:g} points below the base"
    return [Series(name, [(max(places), height), (min(places), height)], "bound")]


def _accuracies(run: Run) -> list[tuple[str, str, list[float]]]:
    """Name, style and accuracies (the base's first) of every line."""
    base = (run.facts.get("base") or {}).get("reward_split_accuracy")
    if base is None or not run.layers:
        return []
    controls = run.curves.get("controls") or {}
    others = [name for name in (*run.methods, *controls.get("methods", {})) if name not in STYLES]
    styles = STYLES | dict(zip(dict.fromkeys(others), ("second", "third", "fourth"), strict=False))
    found = []
    for name, layers in {} if run.one_shot else run.methods.items():
        # In a run with several methods their colour tells them apart; in one with controls, the recovery does.
        shown = label(name) if len(run.methods) > 1 or not controls else f"{label(name)}, recovered after each layer"
        found.append((shown, styles.get(name, "best"), [base, *(layer.recovered_accuracy for layer in layers)]))
    for name, accuracies in controls.get("methods", {}).items():
        style = "replayed" if name == AGENT else styles.get(name, "best")
        found.append((f"{label(name)}, not recovered", style, [controls["base_accuracy"], *accuracies]))
    return found


def _steps(run: Run) -> tuple[Axis, list[float]]:
    """The axis along the schedule and the place of the base and of every layer on it."""
    macs, base = run.curves.get("macs"), run.curves.get("base_macs")
    if macs and base:
        return Axis("MACs left, % of the base", "{:g}".format, falling=True), [100.0, *(100 * m / base for m in macs)]
    return Axis("layers decided", "{:g}".format), [float(i) for i in range(len(run.layers) + 1)]


def _trade_off_text(run: Run) -> str:
    text = (
        "One point per layer, from the base on the left to all layers cut on the right. "
        f"{display_name(run.metric, opens=True)} on the reward split."
    )
    text += _chance_text(run)
    if run.one_shot:
        text += " The agent decided all layers at once: only the last point is what it aimed at."
    controls = run.curves.get("controls")
    if not controls:
        return text
    return (
        f"{text} Lines marked 'not recovered' were measured on {controls['n_images']:,} reward images without any "
        "training: the agent's own masks, and controls that keep the same number of filters in every layer, all with "
        "the run's own compensation. They show what the choice of filters alone is worth."
    )


def kept_bars(run: Run) -> Markup | None:
    """Kept and dropped filters of every layer."""
    masks = original_masks(run)
    if not masks:
        return None
    longest = max(map(len, masks.values()))
    rows = []
    for name, mask in masks.items():
        kept, total = sum(mask), len(mask)
        rows += [tag("div", name, class_="name"), bar(f"Filters of {name}", kept, total, longest)]
        rows.append(tag("div", f"{kept} of {total}"))
    key = tag("p", kept_key(), class_="soft")
    decided = {layer.name: layer for layer in run.layers}
    head = [
        "layer",
        "filters",
        "kept",
        "kept, %",
        f"{display_name(run.metric)} after the cut",
        "recovered",
        "decided by",
    ]
    body = [[name, len(mask), sum(mask), f"{100 * sum(mask) / len(mask):.0f}", *_decided(decided[name])]
            for name, mask in masks.items()]  # fmt: skip
    text = "Bars are as long as the layer has filters."
    return section("Filters kept in each layer", text, key, tag("div", *rows, class_="bars"),
                   fold("As a table", table(head, body)))  # fmt: skip


def _decided(layer: Layer) -> list[str]:
    return [percent(layer.pruned_accuracy), percent(layer.recovered_accuracy), layer.decided_by]


def kept_key() -> Markup:
    """What the two colours of a bar are."""
    return join((tag("span", class_="key"), " kept \N{NO-BREAK SPACE} ", tag("span", class_="key off"), " dropped"))


def learning_curves(run: Run) -> Markup | None:
    """Reward over updates, one small plot an agent."""
    curves = {layer.name: layer.reward_curve for layer in run.layers if layer.reward_curve}
    if run.network_curve:
        curves = {"the whole network": run.network_curve}
    if not curves:
        return None
    converged = {layer.name for layer in run.layers if layer.facts.get("converged")}
    plots = [learning_curve(name, curve, name in converged) for name, curve in curves.items()]
    rows = [[i + 1, *(_cell(curve, i) for curve in curves.values())] for i in range(max(map(len, curves.values())))]
    values = fold("As a table", table(["update", *curves], rows))
    text = "Mean reward of the masks of each update (solid) and the highest so far (dashed)."
    if not run.one_shot and "TryAndLearn" in str((run.config.get("reward") or {}).get("_target_")):
        text += " Keeping every filter scores 0."
    return section("What the agents learned", text, tag("div", *plots, class_="many"), values)


def learning_curve(name: str, curve: Sequence[float], converged: bool) -> Markup:
    """Reward over the updates of one agent."""
    best = [max(curve[: i + 1]) for i in range(len(curve))]
    series = [
        Series("highest so far", list(enumerate(best, 1)), "best"),
        Series("mean reward", list(enumerate(curve, 1)), "agent"),
    ]
    words = f"Mean reward from {curve[0]:.3f} to {curve[-1]:.3f} over {len(curve)} updates; highest {best[-1]:.3f}."
    x = Axis("update", "{:g}".format, (1, max(len(curve), 2)))
    plot = mini_chart(f"Learning curve of {name}", words, series, x, Axis("reward", "{:g}".format))
    stopped = " (converged)" if converged else ""
    below = tag("div", f"reward by update, {len(curve)} updates{stopped}", class_="soft")
    return tag("div", tag("h3", name), plot, below)


def _cell(curve: Sequence[float], i: int) -> str:
    return f"{curve[i]:.4f}" if i < len(curve) else "-"


def filter_map(run: Run) -> Markup | None:
    """Which filters are left, one cell each, in the order of the original network."""
    masks = original_masks(run)
    if not masks:
        return None
    strips = [
        tag("div", tag("h3", name), tag("div", f"{sum(mask)} of {len(mask)} kept", class_="soft"), strip(name, mask))
        for name, mask in masks.items()
    ]
    rows = [[name, tag("code", ranges([i for i, one in enumerate(mask) if one]))] for name, mask in masks.items()]
    text = "Filters are numbered as in the original network: row by row, 32 per row, starting at 0."
    numbers = fold("Numbers of the filters kept", table(["layer", "kept"], rows))
    key = tag("p", kept_key(), class_="soft")
    return section("Which filters were kept", text, key, tag("div", *strips, class_="strips"), numbers)


def origin(run: Run) -> Markup | None:
    """Command, splits, versions and configuration."""
    facts = run.facts
    command = " ".join(shlex.quote(str(part)) for part in facts.get("command") or [])
    splits = facts.get("splits") or {}
    rows = [
        [
            role,
            f"{entry.get('n_images', 0):,}",
            str(entry.get("source", "")),
            tag("code", str(entry.get("sha256", ""))[:12]),
        ]
        for role, entry in splits.items()
    ]
    parts = [
        copyable(command) if command else None,
        table(["split", "images", "taken from", "sha256"], rows) if rows else None,
        fold("Versions and machine", table(["", ""], _versions(facts))),
        fold(
            "Configuration",
            tag("pre", tag("code", OmegaConf.to_yaml(OmegaConf.create(dict(run.config))))),
        ),
    ]
    text = "The fit split trains weights, the reward split scores masks, the report split is opened once, at the end."
    return section("How it was made", text if rows else None, *parts)


def _versions(facts: Mapping[str, Any]) -> Sequence[Sequence[object]]:
    machine = facts.get("machine") or {}
    known = {**(facts.get("versions") or {}), **machine, "seed": facts.get("seed"), "commit": facts.get("git")}
    return [[name, "-" if value is None else str(value)] for name, value in known.items()]
