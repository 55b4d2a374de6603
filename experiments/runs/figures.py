"""Figures of a run as SVG and PDF, drawn by matplotlib, which is an extra: without it a run has its tables alone."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...atomic import write_atomically
from .console import Terminal
from .folder import RunFolder

# Colours that the colour-blind can tell apart, without black and yellow (Okabe and Ito 2008, "Color universal design").
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
# As journals ask: letters of 8 points at the size it is printed in, and fonts that stay text in a PDF.
PRINTED = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,
    # Neither the date nor random ids: the same results give the same file.
    "svg.hashsalt": "keepdrop",
}
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def can_plot(terminal: Terminal) -> bool:
    """Whether matplotlib is installed; a warning says how to install it."""
    if importlib.util.find_spec("matplotlib") is None:
        terminal.warn("matplotlib is not installed, so there is no plot: pip install keepdrop[plots]")
        return False
    return True


@contextmanager
def printed_figure(folder: RunFolder, name: str, width: float, height: float) -> Iterator[Any]:
    """A figure to draw on, in inches; `name`.svg and `name`.pdf afterwards."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(PRINTED):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        for kind, metadata in UNDATED.items():
            file = io.BytesIO()
            figure.savefig(file, format=kind, metadata=metadata)
            write_atomically(folder.path / f"{name}.{kind}", file.getvalue())
