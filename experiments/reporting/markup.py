"""HTML and SVG as strings, escaped by construction: only what `tag` made is taken as markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

VOID = {"meta", "path", "rect", "line", "circle", "polyline"}


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. Children that are not `Markup` are escaped; None and False attributes are left out.

    Attribute names are Python's: `class_` is class, `aria_label` is aria-label; True gives a bare attribute.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if name in VOID and not children:
        return Markup(f"<{name}{given}>" if name == "meta" else f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
    """Children one after another; None is nothing."""
    parts = (child if isinstance(child, Markup) else escape(str(child)) for child in children if child is not None)
    return Markup("".join(parts))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str | None = None) -> Markup:
    """A table whose first column names the row; it scrolls by itself where the screen is narrow."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [
        tag("tr", *(tag("th", row[0], scope="row") if i == 0 else tag("td", cell) for i, cell in enumerate(row)))
        for row in rows
    ]
    title = tag("caption", caption) if caption else None
    return tag("div", tag("table", title, tag("thead", top), tag("tbody", *body)), class_="scroll", tabindex="0")


def fold(summary: str, *children: object) -> Markup:
    """A part that opens on a click."""
    return tag("details", tag("summary", summary), *children)


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
