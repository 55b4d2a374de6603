"""What every command with a run folder does: check, open the folder, work, report, show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from functools import partial
from typing import Any, TypeVar

from omegaconf import DictConfig

from ...errors import UserError
from ..config.entry_point import interruptible, open_run
from ..runs.console import Terminal
from ..runs.context import RunContext
from ..runs.folder import METRICS
from ..runs.tracking import Tracker
from .report import keep_report

InputsT = TypeVar("InputsT")


def carry_out(
    config: DictConfig,
    check: Callable[[DictConfig], InputsT],
    work: Callable[[InputsT, RunContext], dict[str, Any]],
    show: Callable[[Mapping[str, Any], RunContext], None],
) -> dict[str, Any]:
    """One run from its composed configuration to its final table; a finished one is only shown again.

    Args:
        config: root configuration.
        check: finds every mistake before anything is written; a resumed run is checked as it began.
        work: returns what `metrics.json` holds, which it writes last.
        show: prints the result.
    """
    inputs = None if config.get("resume") else check(config)
    with open_run(config) as (folder, config):
        context = RunContext(config, folder, Terminal(config.quiet), Tracker(folder / "tensorboard"))
        metrics = folder.read_json(METRICS)
        if metrics is None:
            with interruptible(folder) if "resume" in config else nullcontext(), closing(context.tracker):
                metrics = work(check(config) if inputs is None else inputs, context)
            show_it = partial(show, metrics, context)
        else:
            show_it = partial(_shown_again, show, metrics, context)
        keep_report(folder, context.terminal)
        show_it()
        context.terminal.console.print(f"Run folder: {folder.place}", markup=False)
    return dict(metrics)


def _shown_again(
    show: Callable[[Mapping[str, Any], RunContext], None], metrics: Mapping[str, Any], context: RunContext
) -> None:
    """What a finished run wrote; JSON that parses but says something else is a `UserError`."""
    try:
        show(metrics, context)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{str(context.folder / METRICS)!r} does not hold what a run writes ({type(error).__name__}: {error}); put "
            "back the one that the run wrote."
        ) from error
