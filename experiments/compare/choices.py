"""What every method chose: made once, kept in `choices/`, looked up by the methods that follow another.

Shapes: N filters of a group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ...agent.criteria import CRITERIA
from ...agent.learning.natural_evolution import NetworkTrainer
from ...envs.one_shot import OneShotTask
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.repair.reconstruction_error import RECONSTRUCTION
from ...envs.surgery.group_cost import pruned_cost
from ...envs.surgery.targets import Target
from ...envs.task import PruningTask
from ...errors import UserError, first_line
from ..config.build import build_augment
from ..config.entry_point import settings
from ..pruning.agent_places import PRETRAINED
from ..pruning.halving import Training
from ..pruning.network_search import NetworkAgent, NetworkSearchSettings
from ..runs.folder import RunFolder
from ..runs.seeds import derive_seed
from ..training.train_settings import TrainSettings
from .methods import (
    AGENT,
    MEAN_RANKED,
    PEERS,
    AtAgentCounts,
    CriterionMethod,
    Masks,
    Method,
    Observations,
    PretrainedMethod,
    RandomBest,
    ReconstructionMethod,
    check_masks,
)
from .plan import Job, chosen_methods
from .torch_pruning import TorchPruning

EVALUATIONS = 100  # masks of a random search where no agent says how many it evaluated


class Choices:
    """Chooses for every job, and remembers in the run folder.

    Args:
        task: of the dense network.
        config: root configuration of the comparison.
        folder: of the run.

    `report(done, detail)` is called as an agent learns, with the fraction done of one choice.
    """

    def __init__(self, task: PruningTask, config: DictConfig, folder: RunFolder) -> None:
        self.task, self.config, self.folder = task, config, folder
        self.search = settings(config.network_search, NetworkSearchSettings)
        self.repair = settings(config.repair, ReconstructionSettings)
        self.report: Callable[[float, str], None] = lambda done, detail: None
        self._exact: dict[tuple[int, bool], OneShotTask] = {}
        self.methods = self._methods()

    def _methods(self) -> dict[str, Method]:
        seen, some = Observations(), self.search.images
        made: list[Method] = [CriterionMethod(name, how, seen) for how in ("uniform", "global") for name in CRITERIA]
        made += [CriterionMethod(name, "global-mean", seen) for name in MEAN_RANKED]
        made += [AtAgentCounts(name, seen, self._agent_masks) for name in CRITERIA]
        made += [RandomBest(inside, seen, self._tasks, self._evaluations, some) for inside in ("random", "taylor")]
        made += [ReconstructionMethod(), PretrainedMethod()]
        made += [TorchPruning(global_pruning) for global_pruning in (False, True)]
        return {method.name: method for method in made}

    def _agent(self, job: Job) -> NetworkAgent:
        """A fresh agent for one job; what it has learned is on disk after every update."""
        state = self._state(job)
        state.parent.mkdir(parents=True, exist_ok=True)
        return NetworkAgent(self.search, self.task_of(job), partial(self._learned, job), state, self._training(job))

    def _training(self, job: Job) -> Training:
        """How halving, if it is wanted, trains an agent's best masks."""
        train, augment = settings(self.config.finetune, TrainSettings), build_augment(self.config.augment)
        return Training(
            train, augment, lambda trained: self.report(trained.done / trained.total, f"{job.label}, {trained}")
        )

    def _state(self, job: Job) -> Path:
        return self.folder / f"choices/{job.key}.state"

    def _learned(self, job: Job, trainer: NetworkTrainer, metrics: Mapping[str, float]) -> None:
        done = len(trainer.history) / max(self.search.agent.updates, 1)
        self.report(done, f"{job.label}, mean accuracy {100 * metrics['reward_mean'] * self.task.base.accuracy:.1f} %")

    def has(self, job: Job) -> bool:
        """Whether the choice of a job is in the run folder."""
        return (self.folder / _file(job)).is_file()

    def record(self, job: Job) -> dict[str, Any]:
        """The choice of a job as JSON: kept filters, MACs, seconds, facts; or why it was left out ("skipped")."""
        found = self.folder.read_json(_file(job))
        if found is None:
            found = self._choose(job)
            self.folder.write_json(_file(job), found)
            self._state(job).unlink(missing_ok=True)
        return dict(found)

    def masks(self, record: Mapping[str, Any]) -> Masks:
        """Masks (N,) of every group in a record."""
        masks = {}
        for group in self.task.groups:
            masks[group.name] = torch.zeros(group.n_filters, dtype=torch.bool)
            masks[group.name][record["kept"][group.name]] = True
        return masks

    def task_of(self, job: Job) -> OneShotTask:
        """The network of a job, its seed's images and its compensation; one object for all jobs that share them."""
        key = (job.seed, job.compensate)
        if key not in self._exact:
            evaluation = replace(self.task.settings, compensate=job.compensate)
            task = self.task.with_settings(evaluation, derive_seed(job.seed, "task"))
            self._exact[key] = OneShotTask(task, self.repair if job.compensate else None)
        return self._exact[key]

    def _tasks(self, task: PruningTask) -> tuple[OneShotTask, OneShotTask]:
        """The network as a search evaluates it, and exactly."""
        exact = next(one_shot for one_shot in self._exact.values() if one_shot.task is task)
        return exact.with_repair(self.search.rough(exact.repair)), exact

    def _choose(self, job: Job) -> dict[str, Any]:
        target, task = Target(job.removed, self.config.targets.of), self.task_of(job).task
        started = time.perf_counter()
        try:
            masks, facts = self._asked(job, task, target)
        except Exception as error:
            # What a criterion or another library cannot do is a fact about it, and no reason to stop the comparison.
            if job.method in PEERS:
                return {"skipped": f"{type(error).__name__}: {first_line(error)}"}
            if job.method in (RECONSTRUCTION, PRETRAINED) and isinstance(error, UserError):
                return {"skipped": str(error).rstrip(".")}
            raise
        seconds = time.perf_counter() - started
        removed = check_masks(job.method, task, target, masks)
        counts = {group: int(masks[group.name].sum()) for group in task.groups}
        macs, params = pruned_cost(task.model, task.cost, counts)
        return {
            "kept": {group.name: masks[group.name].nonzero().flatten().tolist() for group in task.groups},
            "n_kept": {group.name: count for group, count in counts.items()},
            "macs_removed": removed,
            "network_macs": macs,
            "network_params": params,
            "seconds": seconds,
            "facts": facts,
        }

    def _asked(self, job: Job, task: PruningTask, target: Target) -> tuple[Masks, dict[str, Any]]:
        if job.method == AGENT:
            agent = self._agent(job)
            return agent.choose(target, job.seed), agent.facts
        method = self.methods[job.method]
        return method.choose(task, target, job.seed), dict(getattr(method, "facts", {}))

    def _followed(self, task: PruningTask, target: Target, seed: int) -> dict[str, Any]:
        assert target.removed is not None  # targets of a comparison are fractions of the MACs
        return self.record(Job(AGENT, target.removed, task.settings.compensate, seed))

    def _agent_masks(self, task: PruningTask, target: Target, seed: int) -> Masks:
        return self.masks(self._followed(task, target, seed))

    def _evaluations(self, task: PruningTask, target: Target, seed: int) -> int:
        wanted = self.config.random_best.evaluations
        if wanted is not None or AGENT not in chosen_methods(self.config):
            return EVALUATIONS if wanted is None else int(wanted)
        return int(self._followed(task, target, seed)["facts"].get("mask_evaluations", EVALUATIONS))


def _file(job: Job) -> str:
    return f"choices/{job.key}.json"
