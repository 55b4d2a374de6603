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
import pickle
import shutil
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ...errors import UserError, first_line, summarised
from ...ranges import check_number

# Of indices int64 (n,), the seed of an epoch, and where their n images go; returns their targets.
Fetch = Callable[[Tensor, int, Tensor], Tensor]
JOB_BYTES = 4 * 2**20  # of what a worker reads before it hands it over
MOST_PER_JOB = 128  # images of it
AHEAD_BYTES = 256 * 2**20  # of what lies read and waits, of all workers together
SHARED = Path("/dev/shm")  # where processes hand over tensors on Linux
MOST_WORKERS = (0, 256)
MOST_BUFFERS = 3
_FAILED: list[UserError] = []  # in a worker: why it cannot begin
ENDS = (signal.SIGINT, signal.SIGTERM)  # what ends a run, and often comes to all of its processes


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
            check_number("workers", [count], MOST_WORKERS)
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
    fetch: Fetch, jobs: Sequence[Tensor], workers: Workers, like: Tensor, wanted: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Images and targets that `fetch` reads for each of `jobs`, int64 (n,) each, in their order; errors as raised.

    Images (n, ...), of the shape and type of `like` each, lie in memory that is used again: they hold until the next
    ones are asked for. `wanted` of them are to be ready when their turn comes, if that is no more than 256 MiB or half
    of the shared memory. A single job is read by this process. Raises UserError where a worker ends before its time.
    """
    if not jobs:
        return
    largest = max(map(len, jobs))
    if not workers.usable or len(jobs) < 2:
        images, seed = like.new_empty((largest, *like.shape)), torch.initial_seed()
        for job in jobs:
            yield images[: len(job)], fetch(job, seed, images[: len(job)])
        return
    factor = _prefetch(largest * like.numel() * like.element_size(), math.ceil(wanted / largest), workers.count)
    # A place for each job that waits, for the one that is looked at, and for one that is about to be.
    shared = like.new_empty((factor * workers.count + 2, largest, *like.shape)).share_memory_()
    with _started(fetch, jobs, workers, factor, shared) as results:
        for number, job in enumerate(jobs):
            try:
                targets = next(results)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader "):
                    raise
                raise _ended(error, workers.count) from error
            if isinstance(targets, UserError):
                raise targets
            yield shared[number % len(shared), : len(job)], torch.from_numpy(targets)


def _prefetch(job_bytes: int, jobs: int, count: int) -> int:
    """Jobs that wait per worker: those wanted and one that it works on, within the limits of memory."""
    room = AHEAD_BYTES
    with suppress(OSError):
        room = min(room, shutil.disk_usage(SHARED).free // 2)
    return max(1, min(1 + math.ceil(jobs / count), room // (job_bytes * count)))


@contextmanager
def _started(
    fetch: Fetch, jobs: Sequence[Tensor], workers: Workers, factor: int, shared: Tensor
) -> Iterator[Iterator[Any]]:
    """The iterator of a DataLoader whose workers run; they have ended afterwards."""
    results: Any = None
    try:
        with warnings.catch_warnings(), _without_interrupts():
            # More workers than cores are the caller's choice; a fork beside other threads is what DataLoader does.
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message="Got pickle error", category=UserWarning)
            try:
                results = iter(_loader(fetch, jobs, workers, factor, shared))
            except (TypeError, AttributeError, pickle.PicklingError) as error:
                raise _not_copied(error) from error
        yield results
    finally:
        if results is not None:
            # As torch does when it goes; an error's traceback may hold it until a later fork copies it.
            results._shutdown_workers()


def _loader(fetch: Fetch, jobs: Sequence[Tensor], workers: Workers, factor: int, shared: Tensor) -> DataLoader[Any]:
    seed = torch.initial_seed()
    return DataLoader(
        _Jobs(fetch, seed, shared),
        batch_size=None,
        # As arrays: tensors would come by a thread of this process, which complains of a worker that ends meanwhile.
        sampler=[(job.numpy(), number % len(shared)) for number, job in enumerate(jobs)],
        num_workers=workers.count,
        collate_fn=_as_it_is,
        timeout=workers.patience,
        worker_init_fn=_Ready(workers, os.getpid()),
        multiprocessing_context=workers.method or ("fork" if sys.platform == "linux" else None),
        generator=torch.Generator().manual_seed(seed),  # or it would draw from the one that training draws from
        prefetch_factor=factor,
    )


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until afterwards: in mid-fork Python would lose them, or a worker print them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, frame: came.append(number)) for each in ENDS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler or signal.SIG_DFL)
    for number in came[:1]:
        signal.raise_signal(number)


class _Jobs(Dataset[Any]):
    """Jobs as items: the images go to their place, and targets come back, or what the user has to fix as raised."""

    def __init__(self, fetch: Fetch, seed: int, shared: Tensor) -> None:
        self.fetch, self.seed, self.shared = fetch, seed, shared

    def __getitem__(self, job: tuple[np.ndarray, int]) -> Any:
        indices, place = torch.from_numpy(job[0]), job[1]
        if _FAILED:
            return _FAILED[0]
        try:
            return self.fetch(indices, self.seed, self.shared[place, : len(indices)]).numpy()
        except UserError as error:
            return error


def _as_it_is(found: Any) -> Any:
    return found


@dataclass(frozen=True)
class _Ready:
    """What a worker does first: it leaves Ctrl-C to the process that started it, and does not outlive that one.

    SIGTERM ends it without an error: batch systems send it to every process of a run, and torch would raise in the one
    that started it, in the middle of its own ending, that a worker was killed.
    """

    workers: Workers
    parent: int

    def __call__(self, number: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
        if sys.platform == "linux":
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a run's lock is inherited by a fork
            if os.getppid() != self.parent:
                os._exit(1)
        if self.workers.ready is not None:
            object.__setattr__(get_worker_info(), "dataset", self.workers.dataset)
            try:
                self.workers.ready(number)
            except Exception as error:
                _FAILED.append(
                    UserError(f"The worker_init_fn of a DataLoader fails ({summarised(error)}); fix or leave it out.")
                )


def _ended(error: RuntimeError, count: int) -> UserError:
    """The sentence for a worker that is gone, out of memory most of the time, or that takes too long."""
    if "timed out" in str(error):
        return UserError(
            f"A process that reads images takes longer than its DataLoader allows ({first_line(error)}); give it a "
            "longer timeout, or 0 for any time."
        )
    return UserError(
        f"One of {count} processes that read images ended ({first_line(error)}); memory, or the shared memory of a "
        "container (docker run --shm-size), may be too small for them:",
        python="read with fewer (workers=), or with none (workers=0).",
        typed="read with fewer (data.workers=1), or with none (data.workers=0).",
    )


def _not_copied(error: Exception) -> UserError:
    """The sentence for a data set that cannot be handed to processes that are not forks of this one."""
    return UserError(
        f"A data set cannot be handed to the processes that read it ({summarised(error)}); leave out what cannot "
        "be pickled, such as locks, open files and lambdas, or read in this process:",
        python="workers=0.",
        typed="data.workers=0.",
    )


class Buffers:
    """Memory for batches that is used again once nobody holds the batch any more: fresh pages are slow to come by."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self._lent: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """float32 of this shape; in page-locked memory, of which torch keeps a stock of its own, if wanted."""
        if self.pinned:
            return torch.empty(shape, pin_memory=True)
        free = next((array for array, view in self._lent if array.shape == shape and view() is None), None)
        array = np.empty(shape, dtype=np.float32) if free is None else free
        view = array[...]  # lives as long as a tensor that was made of it
        others = [each for each in self._lent if each[0] is not array]
        self._lent = [*others[-MOST_BUFFERS + 1 :], (array, weakref.ref(view))]
        return torch.from_numpy(view)


def in_batches(
    fetch: Fetch, parts: Sequence[Tensor], workers: Workers, like: Tensor, pinned: bool
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Images and targets of each of `parts`, read in smaller jobs, with two parts ready ahead of their turn."""
    size = job_size(like.numel() * like.element_size())
    jobs, buffers = [part.split(size) for part in parts], Buffers(pinned)
    stream = read_ahead(fetch, [job for each in jobs for job in each], workers, like, 2 * max(map(len, parts)))
    with closing(stream):
        for part, each in zip(parts, jobs, strict=True):
            images, targets = buffers.empty((len(part), *like.shape)), []
            for rows in images.split(size)[: len(each)]:
                read, found = next(stream)
                rows.copy_(read)
                targets.append(found)
            yield images, torch.cat(targets)
