"""The whole page of one run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from ...envs.data.objective import display_name
from .cards import (
    BUILT_IN,
    bound_sentence,
    cards,
    change,
    final_accuracy,
    finetune_sentence,
    percent,
    points,
    target_sentences,
    what_runs_where,
)
from .markup import Markup, copyable, page, section, table, tag
from .methods_page import methods_page
from .oracle_page import oracle_page
from .predictions import predictions
from .run_data import Run
from .sections import filter_map, kept_bars, label, learning_curves, origin, printed, trade_off


def run_page(run: Run) -> str:
    """`report.html` of one run."""
    pages = {"compare": methods_page, "oracle": oracle_page}
    return pages.get(run.command, _pruning_page)(run)


def _pruning_page(run: Run) -> str:
    return page(
        f"{run.name} - keepdrop {run.command}",
        tag("header", tag("h1", run.name), tag("p", f"keepdrop {run.command}", class_="soft")),
        _state(run),
        _notes(run),
        _summary(run),
        cards(run),
        what_runs_where(run),
        trade_off(run),
        printed(run, ["curve"]),
        predictions(run),
        _methods(run),
        kept_bars(run),
        learning_curves(run),
        filter_map(run),
        _reload(run),
        origin(run),
    )


def _state(run: Run) -> Markup | None:
    """What the run did not get to, and where the drop bound gave way."""
    metrics = run.metrics
    if metrics is None:
        done = (
            f"{len(run.layers)} layer{'s' * (len(run.layers) != 1)} decided so far"
            if run.layers
            else "nothing decided yet"
        )
        return tag("p", f"This run is unfinished: {done}. The page shows what there is.", class_="note")
    gave_way = metrics.get("gave_way") or [layer.name for layer in run.layers if not layer.within_bound]
    text = bound_sentence({"groups": run.layers, **metrics, "gave_way": gave_way})
    sentences = [*target_sentences(metrics), text, finetune_sentence(metrics)]
    said = [tag("p", each, class_="note") for each in sentences if each]
    return tag("div", *said) if said else None


def _notes(run: Run) -> Markup | None:
    """What was changed in the network that came, and what makes its accuracies uncertain."""
    notes = run.facts.get("notes")
    said = [tag("p", each, class_="note") for each in notes if isinstance(each, str)] if isinstance(notes, list) else []
    return tag("div", *said) if said else None


def _summary(run: Run) -> Markup | None:
    metrics = run.metrics or {}
    last, base = final_accuracy(metrics), metrics.get("base_accuracy")
    if last is None or base is None or not metrics.get("base_macs") or not metrics.get("pruned_macs"):
        return None
    less = change(metrics["base_macs"], metrics["pruned_macs"])
    n_images = run.n_images("report")
    images = f" on {n_images:,} report images, which nothing was chosen on" if n_images else ""
    lost = f"{display_name(run.metric)} {points(last - base)}"
    text = f"MACs {less}, {lost}: {percent(base)} before, {percent(last)} now{images}."
    return tag("p", text, class_="lead")


def _methods(run: Run) -> Markup | None:
    """The agent and its controls on the report split, at equal counts."""
    methods = (run.metrics or {}).get("methods") or {}
    rows = [
        [
            label(name),
            percent(row["pruned_accuracy"]),
            _tuned(row),
            f"{row['pruned_macs']:,}",
            f"{row['pruned_params']:,}",
        ]
        for name, row in methods.items()
    ]
    if not rows:
        return None
    head = ["decided by", "pruned", "fine-tuned", "MACs", "parameters"]
    text = f"All keep the same number of filters in every layer; {display_name(run.metric)} on the report split."
    return section("The agent beside controls", text, table(head, rows))


def _tuned(row: Mapping[str, Any]) -> str:
    accuracy = row.get("finetuned_accuracy")
    return "-" if accuracy is None else percent(accuracy)


def _reload(run: Run) -> Markup | None:
    """A snippet that gives the network back."""
    if run.command == "train-cnn" and run.finished:
        weights = str(run.path / "model.safetensors")
        return section("Prune it", None, copyable(f"keepdrop prune checkpoint={shlex.quote(weights)}"))
    if "pruned" not in run.sizes:
        return None
    folder = json.dumps(str(run.path / "pruned"), ensure_ascii=False)
    lines = ["from keepdrop import load_pruned", ""]
    target = str((run.constructor or {}).get("_target_", ""))
    if target.startswith(BUILT_IN):
        lines.append(f"model = load_pruned({folder})")
    else:
        lines = [*_own_network(target, run.constructor or {}), *lines, f"model = load_pruned({folder}, network)"]
    text = "A torch.nn.Module in evaluation mode; no pickle is read."
    return section("Load the network", text, copyable("\n".join(lines)))


def _own_network(target: str, constructor: Mapping[str, Any]) -> list[str]:
    """Lines that import the user's constructor and bind its arguments."""
    module, _, name = target.rpartition(".")
    if not module:
        return ["network = ...  # a function that builds your dense network"]
    arguments = "".join(f", {key}={value!r}" for key, value in constructor.items() if not key.startswith("_"))
    if not arguments:
        return [f"from {module} import {name} as network"]
    return [
        "from functools import partial",
        f"from {module} import {name}",
        "",
        f"network = partial({name}{arguments})",
    ]
