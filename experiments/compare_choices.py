"""What every method chose: made once, kept in `choices/`, looked up by the methods that follow another.

Shapes: N filters of a group.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

from ..agent.criteria import CRITERIA
from ..envs.group_cost import pruned_cost
from ..envs.target import Target
from ..envs.task import PruningTask
from ..rewards.errors import UserError
from .build import build
from .compare_methods import (
    AGENT,
    PEERS,
    AtAgentCounts,
    CriterionMethod,
    Masks,
    Method,
    Observations,
    RandomBest,
    check_masks,
)
from .compare_peer import TorchPruning
from .compare_plan import Job, chosen_methods
from .run_folder import RunFolder
from .seeds import derive_seed

EVALUATIONS = 100  # masks of a random search where no agent says how many it had judged


def variant(task: PruningTask, job: Job) -> PruningTask:
    """The task of one job: its seed and compensation, and all that is known of the network already."""
    other = copy.copy(task)
    other.settings = replace(task.settings, compensate=job.compensate)
    other.seed = derive_seed(job.seed, "task")
    return other


class Choices:
    """Chooses for every job, and remembers in the run folder.

    Args:
        task: of the dense network.
        config: root configuration of the comparison.
        folder: of the run.
        known: looks up what another run chose for a job; None where there is no such run, or it has no such job.
    """

    def __init__(
        self,
        task: PruningTask,
        config: DictConfig,
        folder: RunFolder,
        known: Callable[[Job], Any] = lambda job: None,
    ) -> None:
        self.task, self.config, self.folder, self.known = task, config, folder, known
        self.methods = self._methods()
        self._tasks: dict[tuple[int, bool], PruningTask] = {}

    def _methods(self) -> dict[str, Method]:
        seen, some = Observations(), self.config.random_best.images
        made: list[Method] = [CriterionMethod(name, how, seen) for how in ("uniform", "global") for name in CRITERIA]
        made += [AtAgentCounts(name, seen, self._agent_masks) for name in CRITERIA]
        made += [RandomBest(inside, seen, self._evaluations, some) for inside in ("random", "taylor")]
        made += [TorchPruning(global_pruning) for global_pruning in (False, True)]
        found = {method.name: method for method in made}
        if AGENT in chosen_methods(self.config):
            found[AGENT] = build_agent(self.config)
        return found

    def record(self, job: Job) -> dict[str, Any]:
        """The choice of a job as JSON: kept filters, MACs, seconds, facts; or why it was left out ("skipped")."""
        name = f"choices/{job.key}.json"
        found = self.folder.read_json(name)
        if found is None:
            found = self.known(job) or self._choose(job)
            self.folder.write_json(name, found)
        return dict(found)

    def masks(self, record: Mapping[str, Any]) -> Masks:
        """Masks (N,) of every group in a record."""
        masks = {}
        for group in self.task.groups:
            masks[group.name] = torch.zeros(group.n_filters, dtype=torch.bool)
            masks[group.name][record["kept"][group.name]] = True
        return masks

    def task_of(self, job: Job) -> PruningTask:
        """The task of a job; the same object for every job of one seed and compensation."""
        key = (job.seed, job.compensate)
        if key not in self._tasks:
            self._tasks[key] = variant(self.task, job)
        return self._tasks[key]

    def _choose(self, job: Job) -> dict[str, Any]:
        target, task, method = Target(job.removed, self.config.targets.of), self.task_of(job), self.methods[job.method]
        started = time.perf_counter()
        try:
            masks = method.choose(task, target, job.seed)
        except Exception as error:
            if job.method not in PEERS:
                raise
            # What another library cannot do is a fact about it, and no reason to stop the comparison.
            return {"skipped": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
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
            "facts": dict(getattr(method, "facts", {})),
        }

    def _followed(self, task: PruningTask, target: Target, seed: int) -> dict[str, Any]:
        return self.record(Job(AGENT, target.removed, task.settings.compensate, seed))

    def _agent_masks(self, task: PruningTask, target: Target, seed: int) -> Masks:
        return self.masks(self._followed(task, target, seed))

    def _evaluations(self, task: PruningTask, target: Target, seed: int) -> int:
        wanted = self.config.random_best.evaluations
        if wanted is not None or AGENT not in chosen_methods(self.config):
            return EVALUATIONS if wanted is None else int(wanted)
        return int(self._followed(task, target, seed)["facts"].get("mask_evaluations", EVALUATIONS))


def build_agent(config: DictConfig) -> Method:
    """The agent of the configuration; UserError for something that does not choose."""
    agent = build(config.agent, "agent")
    if not callable(getattr(agent, "choose", None)):
        raise UserError(
            f"agent._target_={config.agent['_target_']} made a {type(agent).__name__}; expected an object with "
            "choose(task, target, seed)."
        )
    return agent
