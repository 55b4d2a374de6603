"""What a comparison consists of: which methods, and one job for each cell of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from omegaconf import DictConfig

from ...errors import UserError
from ..config.cli_errors import nearest
from .methods import AGENT, FOLLOWS, PEERS, method_names
from .torch_pruning import unavailable

STAGES = ("zero", "bn", "one", "full")  # steps of training after the cut, and batch-norm recalibration


@dataclass(frozen=True)
class Job:
    """One cell of the comparison: one method at one target, with or without compensation, with one seed."""

    method: str
    removed: float
    compensate: bool
    seed: int

    @property
    def setting(self) -> str:
        """Everything but the method, as part of a file name."""
        return f"{self.removed:g}-{'compensated' if self.compensate else 'plain'}-seed{self.seed}"

    @property
    def key(self) -> str:
        """Where its files lie below `choices/` and `results/`."""
        return f"{self.method}/{self.setting}"

    @property
    def label(self) -> str:
        """For a person."""
        how = "compensated" if self.compensate else "plain"
        return f"{self.method}, {100 * self.removed:g} % removed, {how}, seed {self.seed}"


def planned(config: DictConfig) -> list[Job]:
    """All jobs, the agent's first, as others follow it; methods that cannot run here are left out."""
    return [
        Job(name, removed, compensate, seed)
        for name in chosen_methods(config)
        if not (name in PEERS and unavailable())
        for removed in config.targets.removed
        for compensate in config.compensate
        for seed in seeds_of(name, config)
    ]


def seeds_of(method: str, config: DictConfig) -> list[int]:
    """The seeds of a method: random masks get more, since they vary most."""
    seeds = list(config.seeds)
    more = config.random_seeds - len(seeds) if method == "random-uniform" else 0
    spare = (seed for seed in range(len(seeds) + max(more, 0)) if seed not in seeds)
    return seeds + [seed for _, seed in zip(range(more), spare, strict=False)]


def chosen_methods(config: DictConfig) -> list[str]:
    """The methods that the patterns in `methods` name, in a fixed order, the agent first."""
    names = method_names()
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in config.methods)]


def check_plan(config: DictConfig) -> None:
    """UserError for methods, targets, stages or seeds that make no comparison."""
    names = method_names()
    for pattern in config.methods:
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = nearest(pattern, names) or f"expected names or globs of {', '.join(names)}."
            raise UserError(f"methods has {pattern!r}, which names no method; {hint}")
    followers = [name for name in chosen_methods(config) if name.endswith(FOLLOWS)]
    if followers and AGENT not in chosen_methods(config):
        raise UserError(f"methods has {followers[0]!r} but not {AGENT!r}, whose counts it follows; add {AGENT}.")
    _check_distinct("methods", config.methods)
    _check_distinct("targets.removed", config.targets.removed)
    _check_distinct("compensate", config.compensate)
    _check_distinct("seeds", config.seeds)
    _check_distinct("stages", config.stages)
    for stage in config.stages:
        if stage not in STAGES:
            raise UserError(f"stages has {stage!r}; expected any of {', '.join(STAGES)}.")
    if config.bn_images < 2:
        raise UserError(f"bn_images is {config.bn_images}; expected 2 or more.")
    if not planned(config):
        raise UserError(f"Nothing is left to compare: {unavailable()}")


def _check_distinct(name: str, values: Sequence[object]) -> None:
    if not values or len(set(values)) != len(values):
        what = "is empty" if not values else f"names {next(v for v in values if list(values).count(v) > 1)!r} twice"
        raise UserError(f"{name} {what}; expected a list of one or more different values.")
