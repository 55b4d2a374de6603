"""HTML and SVG elements, escaped by MarkupSafe, and the Jinja2 template of the page they stand in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

__all__ = ["Markup", "copyable", "fold", "join", "page", "section", "table", "tag"]

SELF_CLOSING = {"path", "rect", "line", "circle", "polyline", "img"}
# report.html.j2 takes report.css and report.js along: a page is one file.
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


def page(title: str, *content: Markup | None) -> str:
    """A page that needs nothing but itself; its policy forbids it the network."""
    return _TEMPLATES.get_template("report.html.j2").render(title=title, content=join(content))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. Children that are not `Markup` are escaped; None and False attributes are left out.

    Attribute names are Python's: `class_` is class, `aria_label` is aria-label; True gives a bare attribute.
    """
    given = Markup().join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    if name in SELF_CLOSING and not children:
        return Markup("<{}{}/>").format(name, given)
    return Markup("<{0}{1}>{2}</{0}>").format(name, given, join(children))


def join(children: Iterable[object]) -> Markup:
    """Children one after another; None is nothing."""
    return Markup().join(escape(child) for child in children if child is not None)


def section(title: str, text: str | None, *content: Markup | None) -> Markup | None:
    """A heading, a sentence, and what follows; nothing without content."""
    if not any(content):
        return None
    return tag("section", tag("h2", title), tag("p", text, class_="soft") if text else None, *content)


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table whose first column names the row; it scrolls by itself where the screen is narrow."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [
        tag("tr", *(tag("th", row[0], scope="row") if i == 0 else tag("td", cell) for i, cell in enumerate(row)))
        for row in rows
    ]
    whole = tag("table", tag("thead", top), tag("tbody", *body))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label="Table")


def fold(summary: str, *children: object) -> Markup:
    """A part that opens on a click."""
    return tag("details", tag("summary", summary), *children)


def copyable(text: str) -> Markup:
    """Code with a button that copies it."""
    return tag("div", tag("pre", tag("code", text)), class_="copy")


def _attribute(key: str, value: object) -> Markup:
    name = key.rstrip("_").replace("_", "-")
    return Markup(" {}").format(name) if value is True else Markup(' {}="{}"').format(name, value)
