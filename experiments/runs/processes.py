"""Calls of a function spread over processes by joblib: each result as soon as it is there, Ctrl-C ends all of them."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from ...errors import Notice, UserError

Spread = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[Any]]
"""Calls a function of a module, as processes find it by its name, with each of several arguments."""


@contextmanager
def processes(n_workers: int, killed: str) -> Iterator[Spread]:
    """`n_workers` processes that share calls; a single one is this process itself.

    The threads of this machine are divided among the processes, which end with the context: at once where it is left by
    an exception (Ctrl-C). An exception of a call is raised here, as if it had been made here.

    Args:
        n_workers: of them.
        killed: the sentence for a user if a process is killed.

    Raises:
        UserError: `killed`.
    """
    if n_workers == 1:
        yield lambda work, calls: (work(*arguments) for arguments in calls)
        return
    n_threads = max(1, torch.get_num_threads() // n_workers)
    # Killed processes cannot give their semaphores back; the tracker of Python, a process of its own, frees them and
    # would say so in the terminal, behind our own sentence.
    quiet = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), quiet)))

    parallel = Parallel(
        n_workers,
        backend="loky",
        return_as="generator_unordered",
        initializer=_begin_worker,
        initargs=(n_threads,),
    )

    def spread(work: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        try:
            with _ctrl_c_ignored():
                done = parallel(delayed(work)(*arguments) for arguments in calls)
            yield from done
        except TerminatedWorkerError as error:
            raise UserError(killed) from error

    failed = True
    try:
        yield spread
        failed = False
    finally:
        # joblib would keep the processes for later calls, and so the networks and images they hold.
        get_reusable_executor(reuse=True, kill_workers=failed).shutdown(kill_workers=failed)


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


def _begin_worker(n_threads: int) -> None:
    # Ctrl-C reaches every process of a terminal; the one that was started says how to resume, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore", Notice)  # it has said everything before it started this process
    torch.set_num_threads(n_threads)
