"""The cards at the top of a run's page, the figures that matter beside what they were, and what runs where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...envs.data.objective import display_name
from ...envs.files.pruned_network import BUILT_IN as CONSTRUCTORS
from ...envs.surgery.targets import amount
from ..deploy.export import INT8
from ..deploy.fastest import code_of, fastest_ways, int8_times, not_timed_sentence, runtime_of, way_of
from ..deploy.int8 import int8_sentence
from ..deploy.latency import paired, speed_change
from ..runs.console import signed
from .markup import Markup, copyable, section, table, tag
from .run_data import Run

BUILT_IN = tuple(CONSTRUCTORS)  # their files name a constructor that is ours: nobody has to bring it
ARROW, MINUS, TIMES = "\N{RIGHTWARDS ARROW}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


def percent(fraction: float, digits: int = 2) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.{digits}f} %"


def points(difference: float) -> str:
    """A difference of two fractions, signed, in percentage points."""
    return f"{signed(100 * difference)} points".replace("-", MINUS)


def change(before: float, after: float) -> str:
    """Relative change, signed."""
    return f"{signed(100 * (after / before - 1), 1)} %".replace("-", MINUS) if before else "-"


def bound_sentence(metrics: Mapping[str, Any]) -> str | None:
    """What became of the drop bound where it gave way: at which layers, or everywhere; a target does not go by it."""
    gave_way, bound = metrics.get("gave_way") or [], metrics.get("drop_bound")
    if not gave_way or bound is None:
        return None
    if metrics.get("target"):
        return f"Before fine-tuning more than the drop bound of {bound:g} was lost: the target said how much goes."
    # One decision for all layers has one accuracy, so a bound that gave way gave way at all of them.
    everywhere = len(gave_way) > 1 and len(gave_way) == len(metrics.get("groups") or [])
    where = "" if everywhere else f" at: {', '.join(gave_way)}"
    return f"The drop bound of {bound:g} did not hold{where}."


def finetune_sentence(metrics: Mapping[str, Any]) -> str | None:
    """What the reward split said of fine-tuning, where it is not simply the last epoch that is kept."""
    return (metrics.get("finetune") or {}).get("sentence")


def target_sentences(metrics: Mapping[str, Any]) -> list[str]:
    """For every resource of the target what the dense network took, what the pruned one takes, and what was asked."""
    return [_target_sentence(each) for each in metrics.get("target") or []]


def _target_sentence(row: Mapping[str, Any]) -> str:
    name, asked, dense, unit = row["resource"], row["asked"], row["dense"], row["unit"]
    limits = {"milliseconds": asked / 1e3, "bytes": asked, "removed": (1 - asked) * dense}
    limit = amount(limits.get(name, asked * dense), unit)
    how = f" (by the profile: {row['conditions']})" if row.get("conditions") else ""
    return f"Target {name}={asked:g}: {amount(dense, unit)} -> {amount(row['pruned'], unit)}, at most {limit}{how}."


def size(n_bytes: float) -> str:
    """Bytes in kB or MB (powers of ten)."""
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.1f} kB"


def speed(base: Mapping[str, Any], pruned: Mapping[str, Any]) -> str:
    """How much faster or slower one measured latency is than another."""
    return speed_change(base, pruned).replace(" x ", f" {TIMES} ")


def standard_error(fraction: float, n_images: int) -> float:
    """How far an accuracy on `n_images` images may be off by chance (one standard error), a fraction.

    Binomial; for a metric that scores images between 0 and 1 it is an upper bound.
    """
    return math.sqrt(max(fraction * (1 - fraction), 0.0) / n_images)


def final_accuracy(metrics: Mapping[str, Any]) -> float | None:
    """Accuracy on the report split of the best finished state of the network, a fraction."""
    keys = ("finetuned_accuracy", "pruned_accuracy", "report_accuracy")
    return next((metrics[key] for key in keys if metrics.get(key) is not None), None)


def cards(run: Run) -> Markup | None:
    """All cards that the run has figures for."""
    metrics = run.metrics or {}
    found = [_accuracy(run), *_amounts(metrics), _size(run), *_latencies(metrics)]
    shown = [card for card in found if card is not None]
    return tag("div", *shown, class_="cards") if shown else None


def card(title: str, value: str, *below: str) -> Markup:
    """A figure under its name, with lines below it."""
    lines = [tag("p", line) for line in below if line]
    return tag("div", tag("h3", title), tag("div", value, class_="value"), *lines, class_="card")


def _accuracy(run: Run) -> Markup | None:
    metrics = run.metrics or {}
    last, base, name = final_accuracy(metrics), metrics.get("base_accuracy"), display_name(run.metric, opens=True)
    if last is None:
        known = (run.facts.get("base") or {}).get("reward_split_accuracy")
        return None if known is None else card("Base accuracy", percent(known), "on the reward split")
    if base is None:
        return card(name, percent(last), "on the report split")
    tuned, n_images = metrics.get("finetuned_accuracy") is not None, run.n_images("report")
    error = 100 * standard_error(last, n_images) if n_images else 0.0
    chance = f"{n_images:,} images, standard error {error:.2f} points" if n_images else ""
    states = f"base {percent(base)}" + (f", pruned {percent(metrics['pruned_accuracy'])}" if tuned else "")
    title = f"{name}, fine-tuned" if tuned else f"{name}, pruned"
    return card(title, percent(last), f"{points(last - base)} vs. the base", states, chance)


def _amounts(metrics: Mapping[str, Any]) -> list[Markup]:
    made = []
    for title, key in (("MACs per image", "macs"), ("Parameters", "params")):
        before, after = metrics.get(f"base_{key}"), metrics.get(f"pruned_{key}")
        if before and after is not None:
            made.append(card(title, change(before, after), f"{before:,} {ARROW} {after:,}"))
        elif metrics.get(key) is not None:
            made.append(card(title, f"{metrics[key]:,}"))
    return made


def _size(run: Run) -> Markup | None:
    after, before = run.sizes.get("pruned"), run.curves.get("base_bytes") or run.sizes.get("base")
    if after is None:
        return None
    if not before:
        return card("File size", size(after))
    return card("File size", change(before, after), f"{size(before)} {ARROW} {size(after)}")


def _latencies(metrics: Mapping[str, Any]) -> list[Markup]:
    """One card per batch size and runtime."""
    return [_latency(*key, *both) for key, both in paired(metrics.get("latency") or []).items()]


def _latency(runtime: str, batch: int, base: Mapping[str, Any], pruned: Mapping[str, Any]) -> Markup:
    before, after = base["median_seconds"], pruned["median_seconds"]
    times = f"{1e3 * before:.2f} {ARROW} {1e3 * after:.2f} ms"
    where, threads = [str(each) for each in (runtime, base.get("device")) if each], base.get("n_threads")
    if threads:
        where.append(f"{threads} thread" + "s" * (threads != 1))
    return card(f"Latency, batch {batch}", speed(base, pruned), times, _quartiles(base, pruned), ", ".join(where))


def _quartiles(base: Mapping[str, Any], pruned: Mapping[str, Any]) -> str:
    """How far the measurements spread: medians that overlap mean little."""
    if not all("low_seconds" in each and "high_seconds" in each for each in (base, pruned)):
        return ""
    spreads = [f"{1e3 * each['low_seconds']:.2f} to {1e3 * each['high_seconds']:.2f}" for each in (base, pruned)]
    return f"quartiles {f' {ARROW} '.join(spreads)}"


def what_runs_where(run: Run) -> Markup | None:
    """Every network in every runtime that was timed, which is fastest, and the line that runs it so."""
    metrics = run.metrics or {}
    latency = metrics.get("latency") or []
    if not latency:
        return None
    exports = metrics.get("exports") or []
    own, kinds = not str((run.constructor or {}).get("_target_", "")).startswith(BUILT_IN), [e["kind"] for e in exports]
    parts = []
    for sentence, record in fastest_ways(latency):
        parts += [tag("p", sentence), copyable(code_of(record, run.path, own, kinds))]
    said = [
        *(
            int8_sentence(each, display_name(run.metric)) + int8_times(latency)
            for each in exports
            if each["kind"] == INT8
        ),
        *(f"{name}: {why}" for name, why in (metrics.get("latency_failed") or {}).items()),
        not_timed_sentence(metrics.get("latency_not_timed") or {}),
    ]
    text = "Median of a pass with its quartiles, all in turn, and how it compares with the dense network in eager mode."
    below = [tag("p", each, class_="soft") for each in said if each]
    return section("What runs where", text, _ways(latency), *parts, *below)


def _ways(latency: Sequence[Mapping[str, Any]]) -> Markup:
    """A row a network and runtime, a column a batch size."""
    batches = list(dict.fromkeys(each["batch_size"] for each in latency))
    of = {(way_of(each), each["batch_size"]): each for each in latency}
    dense = {each["batch_size"]: each for each in latency if (each["model"], runtime_of(each)) == ("base", "eager")}

    def cell(way: str, batch: int) -> str:
        record = of.get((way, batch))
        if record is None:
            return "-"
        time = f"{1e3 * record['median_seconds']:.2f} ms"
        if "low_seconds" in record:
            time += f" ({1e3 * record['low_seconds']:.2f} to {1e3 * record['high_seconds']:.2f})"
        compared = batch in dense and record is not dense[batch]
        return f"{time}, {speed(dense[batch], record)}" if compared else time

    rows = [[way, *(cell(way, batch) for batch in batches)] for way in dict.fromkeys(map(way_of, latency))]
    return table(["network, runtime", *(f"batch {batch}" for batch in batches)], rows)
