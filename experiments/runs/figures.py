"""Plots of a run as SVG, drawn by matplotlib, which is an extra: without it a run has its tables alone."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .console import Terminal


def can_plot(terminal: Terminal) -> bool:
    """Whether matplotlib is installed; a warning says how to install it."""
    if importlib.util.find_spec("matplotlib") is None:
        terminal.warn("matplotlib is not installed, so there is no plot: pip install keepdrop[plots]")
        return False
    return True


@contextmanager
def svg_figure(width: float, height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """A figure to draw on, in inches, and the text that holds it as SVG afterwards."""
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    # Neither the date nor random ids: the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "keepdrop"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, text
        figure.savefig(text, format="svg", metadata={"Date": None})
