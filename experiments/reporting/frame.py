"""The frame that every page stands in, and what every page of one run ends with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from omegaconf import OmegaConf

from .markup import Markup, fold, table, tag
from .run_data import Run

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
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


def section(title: str, text: str | None, *content: Markup | None) -> Markup | None:
    """A heading, a sentence, and what follows; nothing without content."""
    if not any(content):
        return None
    return tag("section", tag("h2", title), tag("p", text, class_="soft") if text else None, *content)


def copyable(text: str) -> Markup:
    """Code with a button that copies it."""
    return tag("div", tag("pre", tag("code", text)), class_="copy")


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
    text = "fit trains weights, reward scores masks, report is opened once, at the end."
    return section("Where it comes from", text if rows else None, *parts)


def _versions(facts: Mapping[str, Any]) -> Sequence[Sequence[object]]:
    machine = facts.get("machine") or {}
    known = {**(facts.get("versions") or {}), **machine, "seed": facts.get("seed"), "commit": facts.get("git")}
    return [[name, "-" if value is None else str(value)] for name, value in known.items()]
