"""`keepdrop report RUN [RUN ...]`: a page for every run, and one that compares several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ...errors import UserError
from ...remote import Store, is_url, local, named, writing
from ..config.entry_point import run_with_hydra
from ..config.ignored import Ignored, refuse_ignored
from ..reporting.run_data import Run, read_run
from ..reporting.run_page import run_page
from ..reporting.runs_page import comparison_page
from ..runs.console import Terminal
from ..runs.folder import RunFolder

PAGE = "report.html"
WEIGHED = ("base/model.safetensors", "pruned/model.safetensors")  # files whose size it shows


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("report", run)


IGNORED = (Ignored("out", "one run is compared with nothing.", lambda config: len(config.runs) == 1),)


def run(config: DictConfig) -> list[Path]:
    """Write the pages; returns their paths."""
    refuse_ignored(config, IGNORED)
    if not config.runs:
        raise UserError("report needs the folder of a run; expected keepdrop report RUN [RUN ...].")
    paths = [local(str(each), is_read) for each in config.runs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("report was given the same run twice; expected each folder once.")
    with ExitStack() as stack:
        for path, where in zip(paths, config.runs, strict=True):
            stack.enter_context(named(path, str(where)))
        return write_pages(config, paths)


def is_read(name: str) -> bool:
    """Whether a report is made of a file of a run elsewhere, by its name."""
    return Path(name).suffix in (".json", ".yaml") or name in WEIGHED


def write_pages(config: DictConfig, paths: Sequence[Path]) -> list[Path]:
    """The pages of the runs in `paths`, which are copies where `config.runs` names URLs."""
    runs = [read_run(path) for path in paths]
    pages = [rendered(run_page, each) for each in runs]
    comparison = rendered(comparison_page, runs) if len(runs) > 1 else None
    for each, text, where in zip(runs, pages, config.runs, strict=True):
        RunFolder(each.path).write_text(PAGE, text)
        if is_url(where):
            Store(where).put(each.path / PAGE, PAGE)
    written = [path / PAGE for path in paths]
    shown = [f"{str(where).rstrip('/')}/{PAGE}" for where in config.runs]
    if comparison is not None:
        with writing(str(config.out).rpartition("/")[0] if is_url(config.out) else Path(config.out).parent) as folder:
            RunFolder(folder).write_text(Path(config.out).name, comparison)
        written.append(Path(config.out))
        shown.append(str(config.out))
    terminal = Terminal(config.quiet)
    for place in shown:
        terminal.console.print(f"Report: {place}", markup=False)
    return written


def write_report(folder: RunFolder) -> None:
    """`report.html` of a run that has just ended."""
    folder.write_text(PAGE, rendered(run_page, read_run(folder.path)))


def keep_report(folder: RunFolder, terminal: Terminal) -> None:
    """`write_report`, unless a finished run that is shown again has its page."""
    if not (folder / PAGE).is_file():
        write_report(folder)
    terminal.say(f"Report: {folder.place}/{PAGE}")


def rendered(make: Callable[[Any], str], what: Run | Sequence[Run]) -> str:
    """A page; JSON that parses but says something else than a run's is a `UserError`."""
    try:
        return make(what)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        names = what.path if isinstance(what, Run) else ", ".join(str(each.path) for each in what)
        raise UserError(
            f"A JSON file in {str(names)!r} does not hold what a run writes ({type(error).__name__}: {error}); restore "
            "it or run the command anew."
        ) from error
