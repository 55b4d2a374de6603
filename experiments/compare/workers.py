"""The jobs of a comparison spread over processes.

Each process opens the run folder for itself, does one job after another, and writes what it finds where all others look
for it. So results do not depend on who computes them, and a resumed run does what is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..config.build import load_network
from ..config.entry_point import plain
from ..config.prepare import prepare
from ..config.training import WEIGHTS
from ..runs.folder import RunFolder
from ..runs.processes import processes
from .choices import Choices
from .plan import Job

Work = Callable[[Choices, Job], None]
"""Does one job and writes its result into the run folder; a function of a module, as processes find it by its name."""
DoAll = Callable[[Work, Sequence[Job]], Iterator[Job]]
"""Does all jobs, and yields each as soon as it is done."""


@contextmanager
def workers(choices: Choices, n_workers: int) -> Iterator[DoAll]:
    """`n_workers` processes that share jobs (`processes`); a single one is this one, and tells `choices.report` more.

    Raises:
        UserError: a process was killed.
    """
    path, config = choices.folder.path, OmegaConf.to_yaml(choices.config, resolve=True)
    killed = (
        "A process of the comparison was killed, perhaps because memory ran out; what is finished is kept: "
        f"continue with resume={path}."
    )
    with processes(n_workers, killed) as spread:
        if n_workers == 1:
            yield lambda work, jobs: spread(_done, [(work, choices, job) for job in jobs])
        else:
            yield lambda work, jobs: spread(_in_worker, [(work, path, config, job) for job in jobs])


def _done(work: Work, choices: Choices, job: Job) -> Job:
    work(choices, job)
    return job


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
