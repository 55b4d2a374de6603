"""Reading ahead by worker processes (`torch.utils.data.DataLoader`), in order, within a limit of memory.

What a process reads is the same whichever reads it: items whose data set draws random numbers are seeded one by one.

Shape suffixes: B images of a batch.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ...errors import UserError, first_line
from ...ranges import check_number

Fetch = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # of indices, and of the seed of an epoch
JOB_BYTES = 4 * 2**20  # of what a worker reads before it hands it over
MOST_PER_JOB = 128  # images of it
AHEAD_BYTES = 256 * 2**20  # of what lies read and waits, of all workers together
SHARED = Path("/dev/shm")  # where processes hand over tensors on Linux
MOST_WORKERS = (0, 256)


@dataclass(frozen=True)
class Workers:
    """Processes that read items; with a `count` of 0 this process reads them itself.

    `method` starts them (None: fork on Linux, elsewhere what Python chooses), `ready` is called in each with its number
    and finds `dataset` as that of `torch.utils.data.get_worker_info()`, and `patience` is how many seconds one may take
    for a job (0: any number). All four are what a `DataLoader` says of its own workers. `seeded` says that the items
    draw random numbers, and that each is given a seed of its own.
    """

    count: int = 0
    method: str | None = None
    ready: Callable[[int], Any] | None = None
    dataset: Any = None
    patience: float = 0
    seeded: bool = False

    @classmethod
    def chosen(cls, source: Any, count: int | None) -> Workers:
        """`count` of them, or where that is None as many as `source` has, if it is a DataLoader; else none."""
        if count is not None:
            check_number("workers", count, MOST_WORKERS)
        if not isinstance(source, DataLoader):
            return cls(count or 0)
        context: Any = source.multiprocessing_context
        method = None if context is None else context.get_start_method()
        number = source.num_workers if count is None else count
        return cls(number, method, source.worker_init_fn, source.dataset, source.timeout)

    @property
    def usable(self) -> bool:
        """Whether there are any, and this process may start them: one that is a worker itself may not."""
        return self.count > 0 and not multiprocessing.current_process().daemon


def item_seed(seed: int, index: int) -> int:
    """The seed of a data set's item: another one for every epoch's `seed`, whichever process reads it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:4], "big")


def job_size(item_bytes: int) -> int:
    """How many items of this size a worker reads at a time."""
    return max(1, min(MOST_PER_JOB, JOB_BYTES // max(1, item_bytes)))


def read_ahead(
    fetch: Fetch, jobs: Sequence[Tensor], workers: Workers, item_bytes: int, wanted: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """`fetch(job, torch's seed)` of each of `jobs`, int64 (n,) each, in their order; errors as they were raised.

    `wanted` items of `item_bytes` are to be ready when their turn comes, if that is no more than 256 MiB or half of the
    shared memory. A single job is read by this process. Raises UserError where a worker ends before its time.
    """
    if not workers.usable or len(jobs) < 2:
        seed = torch.initial_seed()
        yield from (fetch(job, seed) for job in jobs)
        return
    largest = max(map(len, jobs))
    factor = _prefetch(largest * item_bytes, math.ceil(wanted / largest), workers.count)
    with _started(fetch, jobs, workers, factor) as results:
        while True:
            try:
                found = next(results)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader "):
                    raise
                raise _ended(error, workers.count) from error
            if isinstance(found, UserError):
                raise found
            yield found


def _prefetch(job_bytes: int, jobs: int, count: int) -> int:
    """Jobs that wait per worker: those wanted and one that it works on, within the limits of memory."""
    room = AHEAD_BYTES
    with suppress(OSError):
        room = min(room, shutil.disk_usage(SHARED).free // 2)
    return max(1, min(1 + math.ceil(jobs / count), room // (job_bytes * count)))


@contextmanager
def _started(fetch: Fetch, jobs: Sequence[Tensor], workers: Workers, factor: int) -> Iterator[Iterator[Any]]:
    """The iterator of a DataLoader whose workers run; they have ended afterwards."""
    seed = torch.initial_seed()
    with warnings.catch_warnings():
        # More workers than cores are the caller's choice; a fork beside other threads is what DataLoader does.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        loader: DataLoader[Any] = DataLoader(
            _Jobs(fetch, seed),
            batch_size=None,
            sampler=jobs,
            num_workers=workers.count,
            collate_fn=_as_it_is,
            timeout=workers.patience,
            worker_init_fn=_Ready(workers, os.getpid()),
            multiprocessing_context=workers.method or ("fork" if sys.platform == "linux" else None),
            generator=torch.Generator().manual_seed(seed),  # or it would draw from the one that training draws from
            prefetch_factor=factor,
        )
        results: Any = iter(loader)
    try:
        yield results
    finally:
        # What torch does when the iterator goes; an error's traceback may hold it until a later fork copies it.
        results._shutdown_workers()


class _Jobs(Dataset[Any]):
    """Each job as an item; what the user has to fix comes back as it was raised, not as text."""

    def __init__(self, fetch: Fetch, seed: int) -> None:
        self.fetch, self.seed = fetch, seed

    def __getitem__(self, job: Tensor) -> Any:
        try:
            found = self.fetch(job, self.seed)
        except UserError as error:
            return error
        # Here and not in the thread that sends it, whose errors nobody hears of.
        return tuple(each.share_memory_() for each in found)


def _as_it_is(found: Any) -> Any:
    return found


@dataclass(frozen=True)
class _Ready:
    """What a worker does first: it leaves Ctrl-C to the process that started it, and does not outlive that one."""

    workers: Workers
    parent: int

    def __call__(self, number: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.platform == "linux":
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a run's lock is inherited by a fork
            if os.getppid() != self.parent:
                os._exit(1)
        if self.workers.ready is not None:
            object.__setattr__(get_worker_info(), "dataset", self.workers.dataset)
            self.workers.ready(number)


def _ended(error: RuntimeError, count: int) -> UserError:
    """The sentence for a worker that is gone, out of memory most of the time."""
    return UserError(
        f"One of {count} processes that read images ended ({first_line(error)}); memory, or the shared memory of a "
        "container (docker run --shm-size), may be too small for them:",
        python="read with fewer (workers=), or with none (workers=0).",
        typed="read with fewer (data.workers=1), or with none (data.workers=0).",
    )


def joined(pieces: Sequence[Tensor], pinned: bool) -> Tensor:
    """Pieces of a batch, one after the other; in page-locked memory if wanted."""
    if len(pieces) == 1 and not pinned:
        return pieces[0]
    size = (sum(map(len, pieces)), *pieces[0].shape[1:])
    return torch.cat(list(pieces), out=torch.empty(size, dtype=pieces[0].dtype, pin_memory=pinned))


def in_batches(
    fetch: Fetch, parts: Sequence[Tensor], workers: Workers, item_bytes: int, pinned: bool
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Images and targets of each of `parts`, read in smaller jobs, with two parts ready ahead of their turn."""
    size = job_size(item_bytes)
    jobs = [part.split(size) for part in parts]
    stream = read_ahead(fetch, [job for each in jobs for job in each], workers, item_bytes, 2 * max(map(len, parts)))
    with closing(stream):
        for each in jobs:
            images, targets = zip(*(next(stream) for _ in each), strict=True)
            yield joined(images, pinned), joined(targets, pinned)
