"""Plots as inline SVG, each with a title and a description for those who do not see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, zip_longest

from .markup import Markup, join, tag

WIDE, NARROW = (720, 330), (350, 270)
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 46
CELL, CELLS = 10, 32  # one filter in a strip, filters per row
Points = Sequence[tuple[float, float]]
_ids = count(1)


@dataclass(frozen=True)
class Series:
    """One line of a plot; the first of several lies on top.

    `style` names a colour and a marker of the style sheet, `spread` is half the height of each point's whiskers.
    """

    name: str
    points: Points
    style: str
    line: bool = True
    spread: Sequence[float | None] = ()


@dataclass(frozen=True)
class Axis:
    """What an axis is called (with its unit) and how its numbers are written.

    `ends` fixes where it ends; without it the axis reaches a little beyond the values, but not beyond `most`.
    """

    label: str
    write: Callable[[float], str]
    ends: tuple[float, float] | None = None
    falling: bool = False
    most: float | None = None


def image(title: str, description: str, size: tuple[float, float], *content: object, **attributes: object) -> Markup:
    """An SVG element that a screen reader announces as one picture."""
    number = next(_ids)
    names = tag("title", title, id=f"t{number}"), tag("desc", description, id=f"d{number}")
    box = f"0 0 {size[0]:g} {size[1]:g}"
    labels = f"t{number} d{number}"
    return tag("svg", *names, *content, viewBox=box, role="img", aria_labelledby=labels, **attributes)


def line_chart(
    title: str, description: str, series: Sequence[Series], x: Axis, y: Axis, key: Sequence[Series] | None = None
) -> Markup:
    """A legend (of `key`; None: of all series) and the plot, drawn twice: for wide screens and for phones."""
    plots = [
        image(title, description, size, _plot(series, x, y, size), class_=f"chart {name}")
        for name, size in (("wide", WIDE), ("narrow", NARROW))
    ]
    return join((legend(series if key is None else key), *plots))


def legend(series: Iterable[Series]) -> Markup:
    """What the lines of a plot are."""
    entries = [tag("li", _swatch(each), each.name) for each in series]
    return tag("ul", *entries, class_="legend")


def mini_chart(title: str, description: str, series: Sequence[Series], x: Axis, y: Axis) -> Markup:
    """A small plot, one of many, without a legend and axis titles."""
    size = (260, 130)
    return image(title, description, size, _plot(series, x, y, size, small=True), class_="mini")


def bar(title: str, kept: float, total: int, longest: int) -> Markup:
    """Kept and dropped filters of one layer; bars of one list share the scale `longest`."""
    scale = 100 / max(longest, 1)
    rects = (
        tag("rect", x=0, y=0, width=round(total * scale, 2), height=12, class_="dropped"),
        tag("rect", x=0, y=0, width=round(kept * scale, 2), height=12, class_="kept"),
    )
    words = f"{kept:g} kept, {total - kept:g} dropped, of {total} filters."
    return image(title, words, (100, 12), *rects, class_="bar", preserveAspectRatio="none")


def gauge(title: str, value: float, ends: tuple[float, float], spread: float = 0.0, style: str = "other") -> Markup:
    """A value on a scale from `ends[0]` to `ends[1]`: a mark, and how far the measurements spread around it."""
    scale = 100 / ((ends[1] - ends[0]) or 1.0)
    low, high = ((each - ends[0]) * scale for each in (value - spread, value + spread))
    parts = (
        tag("rect", x=0, y=5.5, width=100, height=1, class_="track"),
        tag("rect", x=round(low, 2), y=4, width=round(high - low, 2), height=4, class_=f"spread {style}"),
        tag("rect", x=round((low + high) / 2 - 0.75, 2), y=0, width=1.5, height=12, class_=f"mark {style}"),
    )
    words = f"{value:.2f}" + (f" ± {spread:.2f}" if spread else "")
    return image(title, words, (100, 12), *parts, class_="bar", preserveAspectRatio="none")


def signed_bar(title: str, value: float, ends: tuple[float, float], style: str = "other") -> Markup:
    """A bar from 0 to `value` on a scale that reaches from `ends[0]` to `ends[1]`."""
    scale = 100 / ((ends[1] - ends[0]) or 1.0)
    zero, at = -ends[0] * scale, (value - ends[0]) * scale
    parts = (
        tag("rect", x=round(min(zero, at), 2), y=1, width=round(abs(at - zero), 2), height=10, class_=f"mark {style}"),
        tag("rect", x=round(min(zero, 99.7), 2), y=0, width=0.3, height=12, class_="zero"),
    )
    return image(title, f"{value:.2f}", (100, 12), *parts, class_="bar", preserveAspectRatio="none")


def strip(title: str, keep: Sequence[bool]) -> Markup:
    """One cell per filter, in the order of the original network; kept ones are filled."""
    rows = math.ceil(len(keep) / CELLS)
    paths = [
        tag("path", d=_cells(i for i, one in enumerate(keep) if one is kept), class_=name)
        for kept, name in ((True, "kept"), (False, "dropped"))
    ]
    kept = ranges([i for i, one in enumerate(keep) if one])
    words = f"{sum(keep)} of {len(keep)} filters kept: {kept}."
    width = CELLS * CELL
    return image(title, words, (width, rows * CELL), *paths, class_="strip", width=width, height=rows * CELL)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs joined: 0, 3-5, 9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "none"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers in [low, high], about `wanted` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((f * power for f in (1, 2, 2.5, 5, 10)), key=lambda each: abs(each - raw))
    first = math.ceil(low / step - 1e-9)
    found = [first * step]
    while found[-1] + step <= high + 1e-9 * step:
        found.append((first + len(found)) * step)
    return [round(each, 12) for each in found]


def span(values: Iterable[float], pad: float = 0.06, most: float | None = None) -> tuple[float, float]:
    """Lowest and highest value with a little room around them, none of it above `most`; never empty."""
    known = list(values) or [0.0]
    low, high = min(known), max(known)
    room = (high - low) * pad or abs(high) * pad or 1.0
    return low - room, high + room if most is None else max(min(high + room, most), low)


def _cells(indices: Iterable[int]) -> str:
    side = CELL - 2
    corners = ((i % CELLS * CELL + 1, i // CELLS * CELL + 1) for i in indices)
    return "".join(f"M{x} {y}h{side}v{side}h-{side}z" for x, y in corners)


def _plot(series: Sequence[Series], x: Axis, y: Axis, size: tuple[int, int], small: bool = False) -> Markup:
    """Grid, numbers, lines and points in a frame of `size`."""
    left, bottom = (44, 20) if small else (LEFT, BOTTOM)
    x_low, x_high = x.ends or span((point[0] for each in series for point in each.points), 0.04)
    y_low, y_high = y.ends or span(heights(series), most=y.most)
    right, floor = size[0] - RIGHT, size[1] - bottom

    def across(value: float) -> float:
        share = (value - x_low) / (x_high - x_low)
        return round(left + (1 - share if x.falling else share) * (right - left), 1)

    def up(value: float) -> float:
        return round(floor - (value - y_low) / (y_high - y_low) * (floor - TOP), 1)

    grid = [_y_tick(up(tick), y.write(tick), left, right) for tick in ticks(y_low, y_high, 3 if small else 5)]
    numbers = [_x_tick(across(tick), x.write(tick), floor) for tick in ticks(x_low, x_high, 3 if small else 5)]
    axis = tag("line", x1=left, x2=right, y1=floor, y2=floor, class_="axis")
    titles = () if small else _titles(x, y, (left + right) / 2, size[1])
    lines = []
    for each in reversed(series):
        drawn = _series(each, [(across(a), up(b)) for a, b in each.points], small, (left + right) / 2)
        lines.append(tag("g", tag("title", each.name), _whiskers(each, across, up), drawn))
    shown = join(lines) if y.ends is None else _clipped(lines, left, right, floor)
    return join((*grid, axis, *numbers, *titles, shown))


def _clipped(lines: Sequence[Markup], left: float, right: float, floor: float) -> Markup:
    """Lines that end where the plot does: an axis with fixed ends may not reach all of them."""
    name = f"c{next(_ids)}"
    frame = tag("rect", x=left - RIGHT, y=0, width=right - left + 2 * RIGHT, height=floor)
    return join((tag("clipPath", frame, id=name), tag("g", *lines, clip_path=f"url(#{name})")))


def heights(series: Sequence[Series]) -> Iterator[float]:
    """All values, and the ends of their whiskers."""
    for each in series:
        for (_, value), spread in zip_longest(each.points, each.spread):
            yield from (value - (spread or 0.0), value + (spread or 0.0))


def _y_tick(at: float, text: str, left: float, right: float) -> Markup:
    line = tag("line", x1=left, x2=right, y1=at, y2=at, class_="grid")
    return join((line, tag("text", text, x=left - 6, y=at + 4, class_="number end")))


def _x_tick(at: float, text: str, floor: float) -> Markup:
    return tag("text", text, x=at, y=floor + 16, class_="number middle")


def _titles(x: Axis, y: Axis, middle: float, height: float) -> tuple[Markup, Markup]:
    at = f"translate(12 {(height - BOTTOM + TOP) / 2}) rotate(-90)"
    below = tag("text", x.label, x=middle, y=height - 6, class_="label middle")
    return below, tag("text", y.label, transform=at, class_="label middle")


def _series(series: Series, points: Points, small: bool, middle: float) -> Markup:
    """Line and points; points without a line have their name beside them, on the side where there is room."""
    drawn = " ".join(f"{a:g},{b:g}" for a, b in points)
    line = tag("polyline", points=drawn, class_=f"line {series.style}") if series.line and len(points) > 1 else None
    dots = [] if small and len(points) > 1 else [_marker(series.style, a, b) for a, b in points]
    names = [] if series.line else [_name(series.name, x, y, x > middle) for x, y in points]
    return join((line, *dots, *names))


def _whiskers(series: Series, across: Callable[[float], float], up: Callable[[float], float]) -> Markup | None:
    """How far values spread around each point."""
    known = [(point, spread) for point, spread in zip(series.points, series.spread, strict=False) if spread]
    ends = [(across(x), max(up(y + spread), TOP), up(y - spread)) for (x, y), spread in known]
    lines = [tag("line", x1=x, x2=x, y1=top, y2=end, class_=f"line {series.style}") for x, top, end in ends]
    return join(lines) if lines else None


def _name(name: str, x: float, y: float, before: bool) -> Markup:
    return tag("text", name, x=x - 9 if before else x + 9, y=y + 4, class_="label end" if before else "label")


def _marker(style: str, x: float, y: float) -> Markup | None:
    """A shape beside the colour: circle, square, triangle or diamond, by style; a bound has none."""
    shape = f"dot {style}"
    if style == "bound":
        return None
    if style in ("l1", "second"):
        return tag("rect", x=round(x - 3.5, 1), y=round(y - 3.5, 1), width=7, height=7, class_=shape)
    if style in ("random", "third"):
        return tag("path", d=f"M{x:g} {y - 4.5:g}l4.5 8h-9z", class_=shape)
    if style in ("base", "fourth"):
        return tag("path", d=f"M{x:g} {y - 5:g}l5 5l-5 5l-5-5z", class_=shape)
    return tag("circle", cx=x, cy=y, r=3.8, class_=shape)


def _swatch(series: Series) -> Markup:
    line = tag("polyline", points="0,7 22,7", class_=f"line {series.style}") if series.line else None
    return tag("svg", line, _marker(series.style, 11, 7), viewBox="0 0 22 14", width=22, height=14, aria_hidden="true")
