"""What a person sees in the terminal: progress while it runs, a table when it is done."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_WIDTH = 160  # of a table that goes into a file or a pipe, where nobody can widen the window


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign; one that rounds to zero has none ("-0.00" is a rounding error, not a loss)."""
    text = f"{value:+.{digits}f}"
    return text if text.strip("+-0.") else text[1:]


class Terminal:
    """Progress bars on a terminal, one line a stage elsewhere, nothing but the result when quiet.

    Bars may stand inside one another: the schedule's with the layer's below it.

    Args:
        quiet: print warnings and the final table only.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        plain = not sys.stdout.isatty()
        width = PLAIN_WIDTH if plain and not os.environ.get("COLUMNS") else None
        # soft_wrap off a terminal: a log or a pipe must not be cut to 80 columns.
        self.console = Console(stderr=False, soft_wrap=plain, highlight=False, width=width)
        self._progress: Progress | None = None
        self._tasks: list[TaskID] = []

    def say(self, text: str) -> None:
        """A line about what happens, left out when quiet."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line that a person has to see."""
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    @contextmanager
    def progress(self, what: str, total: float) -> Iterator[Terminal]:
        """A bar for one stage of work; `advance` moves the innermost one."""
        if self.quiet or not self.console.is_terminal:
            yield self
            return
        outermost = self._progress is None
        if self._progress is None:
            self._progress = _bars(self.console)
            self._progress.start()
        task = self._progress.add_task(what, total=total, detail="")
        self._tasks.append(task)
        try:
            yield self
        finally:
            self._tasks.pop()
            self._progress.remove_task(task)
            if outermost:
                self._progress.stop()
                self._progress = None

    def advance(self, done: float, detail: str = "") -> None:
        """Set the innermost bar to `done`, with a word on how it goes."""
        if self._progress is not None and self._tasks:
            self._progress.update(self._tasks[-1], completed=done, detail=detail)

    def advance_by(self, step: float, detail: str | None = None) -> None:
        """Move the innermost bar by `step`; without a new word the old one stays."""
        if self._progress is not None and self._tasks:
            fields: dict[str, Any] = {} if detail is None else {"detail": detail}
            self._progress.update(self._tasks[-1], advance=step, **fields)

    def layers(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The table of layers: filters before and after."""
        table = Table(title="Filters", title_justify="left")
        table.add_column("layer")
        for name in ("before", "after", "kept"):
            table.add_column(name, justify="right")
        table.add_column("decided by")
        for group in groups:
            kept = f"{100 * group['n_kept'] / group['n_filters']:.0f} %"
            table.add_row(group["name"], str(group["n_filters"]), str(group["n_kept"]), kept, group["decided_by"])
        self.console.print(table)

    def totals(self, rows: Sequence[tuple[str, str, str, str]]) -> None:
        """The table of the whole network: a quantity, its value before, after, and the change."""
        table = Table(title="Network", title_justify="left")
        table.add_column("")
        for name in ("base", "pruned", "change"):
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def methods(self, rows: Mapping[str, Mapping[str, Any]], base_accuracy: float, metric: str) -> None:
        """The table of an agent beside its controls, at equal counts; `metric` is what its title calls it."""
        table = Table(title=f"{metric} on the report split (base {100 * base_accuracy:.2f} %)", title_justify="left")
        table.add_column("decided by")
        for name in ("pruned", "fine-tuned", "MACs", "parameters"):
            table.add_column(name, justify="right")
        for name, row in rows.items():
            tuned = row["finetuned_accuracy"]
            table.add_row(
                name,
                f"{100 * row['pruned_accuracy']:.2f} %",
                "-" if tuned is None else f"{100 * tuned:.2f} %",
                f"{row['pruned_macs']:,}",
                f"{row['pruned_params']:,}",
            )
        self.console.print(table)

    def profile(self, conditions: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Measured time of a network, and how far predictions for pruned copies are off."""
        table = Table(title=f"Time of a pass on {conditions}", title_justify="left")
        table.add_column("runtime")
        for name in ("batch", "dense", "copies", "error", "largest"):
            table.add_column(name, justify="right", overflow="fold")
        table.add_column("layers that take most", overflow="fold")
        for row in rows:
            low, high = (1e3 * each for each in row["spread"])
            errors = ["-" if row[key] is None else f"{100 * row[key]:.1f} %" for key in ("error", "worst")]
            layers = ", ".join(f"{name} {100 * part:.0f} %" for name, part in row["layers"].items())
            dense = f"{1e3 * row['seconds']:.3g} ms ({low:.3g} to {high:.3g})"
            table.add_row(row["runtime"], str(row["batch_size"]), dense, str(row["copies"]), *errors, layers)
        self.console.print(table)

    def inspection(self, described: Mapping[str, Any]) -> None:
        """What can be pruned and what is skipped."""
        table = Table(title=f"{described['macs']:,} MACs, {described['params']:,} parameters", title_justify="left")
        # Where it gets narrow, the lists wrap; a name that is to be copied stays on one line as long as it can.
        table.add_column("group", no_wrap=True, overflow="fold")
        for name in ("filters", "MACs", "parameters"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("coupled with", overflow="fold")
        table.add_column("read by", overflow="fold")
        for row in described["groups"]:
            share = f"{row['macs']:,} ({100 * row['macs'] / max(described['macs'], 1):.1f} %)"
            partners = [", ".join(row[key]) or "-" for key in ("coupled_with", "consumers")]
            table.add_row(row["name"], str(row["n_filters"]), share, f"{row['params']:,}", *partners)
        self.console.print(table)
        total = sum(row["macs"] for row in described["groups"]) / max(described["macs"], 1)
        if total > 1:
            self.console.print(
                f"The shares add up to {100 * total:.0f} %: a convolution between two groups is counted in both, since "
                "it shrinks with either.",
                markup=False,
            )
        whole = [row["name"] for row in described["groups"] if row["may_vanish"]]
        if whole:
            names = ", ".join(whole)
            self.console.print(
                f"With surgery.whole_blocks=true these may keep no filter, and their whole block goes: {names}.",
                markup=False,
            )
        for row in described["skipped"]:
            self.console.print(f"skipped {row['name']}: {row['reason']}", markup=False)


def _bars(console: Console) -> Progress:
    """Description, bar, share, a word on how it goes, time gone and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # A layer may take minutes: rich's 30 seconds would never see two of them end.
    return Progress(*columns, console=console, transient=True, speed_estimate_period=3600)
