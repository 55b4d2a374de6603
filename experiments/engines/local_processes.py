"""Local engine: this process alone, or processes of this machine by joblib; Ctrl-C ends all of them."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import Notice, UserError
from ...ranges import check_numbers
from .engine import Make, Work, Workers


@dataclass(frozen=True)
class LocalEngine:
    """Processes of this machine; a single one is this process itself, which does an item when its result is asked for.

    The threads of this machine are divided among the processes. A killed one is not replaced: on one machine the next
    would mostly be killed for the same reason, memory that ran out.

    Args:
        workers: processes; None: as many as a command has `workers` (compare, pretrain), else one.
    """

    workers: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self, workers=(1, 1024))

    @property
    def is_here(self) -> bool:
        """Whether it is one process."""
        return self.workers in (None, 1)

    def check(self, folder: str | Path | None = None, device: str = "cpu") -> None:
        """This machine sees its own files and devices."""

    @contextmanager
    def open(self, make: Make, *shared: Any, lost: str, here: Any = None) -> Iterator[Workers]:
        """See `Engine.open`; left by an exception (Ctrl-C), the context ends its processes at once."""
        if self.is_here:
            yield _ThisProcess(make, shared, here)
            return
        from joblib.externals.loky import get_reusable_executor  # here, as most processes are alone

        # Killed processes cannot give their semaphores back; the tracker of Python, a process of its own, frees them
        # and would say so in the terminal, behind our own sentence.
        quiet = "ignore:resource_tracker:UserWarning"
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), quiet)))
        failed = True
        try:
            yield _Processes(self.workers or 1, make, shared, lost)
            failed = False
        finally:
            # joblib would keep the processes for later calls, and so the networks and images they hold.
            get_reusable_executor(reuse=True, kill_workers=failed).shutdown(kill_workers=failed)


class Held:
    """A state that is made when it is first needed, so that an exception of `make` is one of the item's."""

    def __init__(self, make: Make, shared: tuple[Any, ...], state: Any = None) -> None:
        self._make, self._shared, self._state = make, shared, state

    @property
    def state(self) -> Any:
        """The state."""
        if self._state is None:
            self._state = self._make(*self._shared)
        return self._state


class _ThisProcess(Workers):
    count = 1

    def __init__(self, make: Make, shared: tuple[Any, ...], here: Any) -> None:
        self.held = Held(make, shared, here)

    def numbered(self, work: Work, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for position, item in enumerate(items):
            yield position, work(self.held.state, item)


class _Processes(Workers):
    def __init__(self, n_workers: int, make: Make, shared: tuple[Any, ...], lost: str) -> None:
        from joblib import Parallel

        self.count, self.lost = n_workers, lost
        self.parallel = Parallel(
            n_workers,
            backend="loky",
            return_as="generator_unordered",
            initializer=_begin_worker,
            initargs=(max(1, torch.get_num_threads() // n_workers), make, shared),
        )

    def numbered(self, work: Work, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        from joblib import delayed
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        try:
            with _ctrl_c_ignored():
                done = self.parallel(delayed(_do)(work, position, item) for position, item in enumerate(items))
            yield from done
        except TerminatedWorkerError as error:
            raise UserError(self.lost) from error


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes started inside inherit it: one that Ctrl-C reaches while it still imports would print a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


_held: Held | None = None  # what this process holds, if it is a worker


def _begin_worker(n_threads: int, make: Make, shared: tuple[Any, ...]) -> None:
    global _held
    # Ctrl-C reaches every process of a terminal; the one that was started says how to resume, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore", Notice)  # it has said everything before it started this process
    torch.set_num_threads(n_threads)
    _held = Held(make, shared)


def _do(work: Work, position: int, item: Any) -> tuple[int, Any]:
    assert _held is not None
    return position, work(_held.state, item)
