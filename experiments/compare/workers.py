"""A comparison spread over processes: each takes some of the settings, and writes its results where all are looked for.

A setting is a target with or without compensation and one seed. All methods of one setting stay together, since some
follow others; so no process waits for another, and a result does not depend on who computes it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .plan import Job

Share = Callable[[Path, int, int], None]


def share_of(jobs: list[Job], index: int, workers: int) -> list[Job]:
    """The jobs of worker `index`: every `workers`-th setting, in the order of the jobs."""
    settings = list(dict.fromkeys(job.setting for job in jobs))
    mine = set(settings[index::workers])
    return [job for job in jobs if job.setting in mine]


@contextmanager
def helpers(folder: Path, workers: int, share: Share) -> Iterator[None]:
    """Processes 1 to `workers - 1` run `share(folder, index, workers)` while the caller does its own share inside.

    The threads of this machine are divided among all. What a process that failed left open, the caller finds and does
    itself; after an exception inside (Ctrl-C) the processes are ended.
    """
    threads = torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    each = max(1, threads // workers)
    processes = [
        context.Process(target=_work, args=(share, folder, index, workers, each)) for index in range(1, workers)
    ]
    torch.set_num_threads(each)
    try:
        for process in processes:
            process.start()
        yield
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()
        torch.set_num_threads(threads)


def _work(share: Share, folder: Path, index: int, workers: int, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        share(folder, index, workers)
    except KeyboardInterrupt:  # the caller says how to go on
        raise SystemExit(130) from None
