"""The jobs of a comparison spread over workers.

Each worker opens the run folder for itself, does one job after another, and writes what it finds where all others look
for it. So results do not depend on who computes them, and a resumed run does what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..config.build import load_network
from ..config.entry_point import plain
from ..config.prepare import prepare
from ..config.training import WEIGHTS
from ..engines.engine import Engine
from ..runs.folder import RunFolder
from .choices import Choices
from .plan import Job

Work = Callable[[Choices, Job], None]
"""Does one job and writes its result into the run folder; a function of a module, as workers find it by its name."""
DoAll = Callable[[Work, Sequence[Job]], Iterator[Job]]
"""Does all jobs, and yields each as soon as it is done."""


@contextmanager
def workers(choices: Choices, engine: Engine) -> Iterator[DoAll]:
    """Workers that share jobs; where that is this process alone, it tells `choices.report` more.

    Raises:
        UserError: a worker was killed for good.
    """
    folder = choices.folder
    lost = (
        "A process of the comparison was killed, perhaps because memory ran out; what is finished is kept: "
        f"continue with resume={folder.place}."
    )
    config = OmegaConf.to_yaml(choices.config, resolve=True)
    with engine.open(_opened, folder.path.absolute(), config, lost=lost, here=choices) as spread:
        yield lambda work, jobs: spread.as_done(_done, [(work, job) for job in jobs])


def _done(choices: Choices, item: tuple[Work, Job]) -> Job:
    work, job = item
    work(choices, job)
    return job


def _opened(path: Path, yaml: str) -> Choices:
    """The choices of the run in folder `path`, whose baseline is there, with the configuration as YAML."""
    folder, config = RunFolder.open(path), OmegaConf.create(yaml)
    assert isinstance(config, DictConfig)
    inputs = prepare(config, plain(config.layers))
    dense = inputs.dense or load_network(inputs.construct, str(folder / "base" / WEIGHTS)).to(inputs.device)
    return Choices(inputs.task(dense), config, folder)
