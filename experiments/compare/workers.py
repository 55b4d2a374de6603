"""The jobs of a comparison spread over processes by joblib.

Each process opens the run folder for itself, does one job after another, and writes what it finds where all others look
for it. So results do not depend on who computes them, and a resumed run does what is missing.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError
from omegaconf import DictConfig, OmegaConf

from ...errors import Notice, UserError
from ..config.build import load_network
from ..config.entry_point import plain
from ..config.prepare import prepare
from ..config.training import WEIGHTS
from ..runs.folder import RunFolder
from .choices import Choices
from .plan import Job

Work = Callable[[Choices, Job], None]
"""Does one job and writes its result into the run folder; a function of a module, as processes find it by its name."""
DoAll = Callable[[Work, Sequence[Job]], Iterator[Job]]
"""Does all jobs, and yields each as soon as it is done."""


@contextmanager
def workers(choices: Choices, n_workers: int) -> Iterator[DoAll]:
    """`n_workers` processes that share jobs; a single one is this process itself, and tells `choices.report` more.

    The threads of this machine are divided among the processes, which end with the context: at once where it is left by
    an exception (Ctrl-C). An exception of a job is raised here, as if the job had been done here.

    Raises:
        UserError: a process was killed.
    """
    if n_workers == 1:
        yield lambda work, jobs: (_done(work, choices, job) for job in jobs)
        return
    path, config = choices.folder.path, OmegaConf.to_yaml(choices.config, resolve=True)
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

    def spread(work: Work, jobs: Sequence[Job]) -> Iterator[Job]:
        try:
            with _ctrl_c_ignored():
                done = parallel(delayed(_in_worker)(work, path, config, job) for job in jobs)
            yield from done
        except TerminatedWorkerError as error:
            raise UserError(
                "A process of the comparison was killed, perhaps because memory ran out; what is finished is kept: "
                f"continue with resume={path}."
            ) from error

    failed = True
    try:
        yield spread
        failed = False
    finally:
        # joblib would keep the processes for later calls, and so the networks and images they hold.
        get_reusable_executor(reuse=True, kill_workers=failed).shutdown(kill_workers=failed)


def _done(work: Work, choices: Choices, job: Job) -> Job:
    work(choices, job)
    return job


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


def _in_worker(work: Work, path: Path, config: str, job: Job) -> Job:
    return _done(work, _opened(path, config), job)


@functools.lru_cache(maxsize=1)
def _opened(path: Path, yaml: str) -> Choices:
    """The choices of the run in folder `path`, whose baseline is there, with the configuration as YAML."""
    folder, config = RunFolder.open(path), OmegaConf.create(yaml)
    assert isinstance(config, DictConfig)
    inputs = prepare(config, plain(config.layers))
    dense = inputs.dense or load_network(inputs.construct, str(folder / "base" / WEIGHTS)).to(inputs.device)
    return Choices(inputs.task(dense), config, folder)
