"""The whole page of one run, and the frame that every page stands in."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from omegaconf import OmegaConf

from .report_cards import cards, change, final_accuracy, percent, points
from .report_data import Run
from .report_markup import Markup, fold, table, tag
from .report_sections import filter_map, kept_bars, label, learning_curves, section, trade_off

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
BUILT_IN = "keepdrop.envs.networks."
SCRIPT = """
document.querySelectorAll('.copy').forEach(function (box) {
  var button = document.createElement('button');
  button.type = 'button'; button.textContent = 'Copy';
  button.addEventListener('click', function () {
    var code = box.querySelector('code');
    getSelection().selectAllChildren(code);
    var done = function () { button.textContent = 'Copied'; };
    var old = function () { if (document.execCommand('copy')) { done(); } };
    if (navigator.clipboard) { navigator.clipboard.writeText(code.textContent).then(done, old); } else { old(); }
  });
  box.appendChild(button);
});
"""


def page(title: str, *content: Markup | None) -> str:
    """A page that needs nothing but itself; its policy forbids it the network."""
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    body = tag("body", tag("main", *content), tag("script", Markup(SCRIPT)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def run_page(run: Run) -> str:
    """`report.html` of one run."""
    return page(
        f"{run.name} - keepdrop {run.command}",
        tag("header", tag("h1", run.name), tag("p", f"keepdrop {run.command}", class_="soft")),
        _state(run),
        _summary(run),
        cards(run),
        trade_off(run),
        _methods(run),
        kept_bars(run),
        learning_curves(run),
        filter_map(run),
        _reload(run),
        _origin(run),
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
        return tag("p", f"This run is unfinished: {done}. What is there is shown.", class_="note")
    gave_way = metrics.get("gave_way") or [layer.name for layer in run.layers if not layer.within_bound]
    if not gave_way or metrics.get("drop_bound") is None:
        return None
    return tag(
        "p", f"The drop bound of {metrics['drop_bound']:g} did not hold at: {', '.join(gave_way)}.", class_="note"
    )


def _summary(run: Run) -> Markup | None:
    metrics = run.metrics or {}
    last, base = final_accuracy(metrics), metrics.get("base_accuracy")
    if last is None or base is None or not metrics.get("base_macs") or not metrics.get("pruned_macs"):
        return None
    less = change(metrics["base_macs"], metrics["pruned_macs"])
    report = (run.facts.get("splits") or {}).get("report") or {}
    images = f" on {report['n_images']:,} report images, which nothing was chosen on" if report.get("n_images") else ""
    text = f"{less} MACs at {points(last - base)} of accuracy: {percent(base)} before, {percent(last)} now{images}."
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
    text = "All keep as many filters in every layer; accuracy on the report split."
    return section("The agent beside controls", text, table(head, rows))


def _tuned(row: Mapping[str, Any]) -> str:
    accuracy = row.get("finetuned_accuracy")
    return "-" if accuracy is None else percent(accuracy)


def _reload(run: Run) -> Markup | None:
    """A snippet that gives the network back."""
    if run.command == "train-cnn" and run.finished:
        weights = str(run.path / "model.safetensors")
        return section("Go on from it", None, copyable(f"keepdrop prune checkpoint={shlex.quote(weights)}"))
    if "pruned" not in run.sizes:
        return None
    folder = json.dumps(str(run.path / "pruned"), ensure_ascii=False)
    lines = ["from keepdrop.envs.pruned_file import load_pruned", ""]
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


def copyable(text: str) -> Markup:
    """Code with a button that copies it."""
    return tag("div", tag("pre", tag("code", text)), class_="copy")


def _origin(run: Run) -> Markup | None:
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
    text = "fit trains weights, reward scores masks, report is opened once, at the end."
    return section("Where it comes from", text if rows else None, *parts)


def _versions(facts: Mapping[str, Any]) -> Sequence[Sequence[object]]:
    machine = facts.get("machine") or {}
    known = {**(facts.get("versions") or {}), **machine, "seed": facts.get("seed"), "commit": facts.get("git")}
    return [[name, "-" if value is None else str(value)] for name, value in known.items()]
