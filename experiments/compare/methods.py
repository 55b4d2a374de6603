"""What is compared: every method as one object that chooses masks of all groups at a MACs target.

Shapes: N filters of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ...agent.criteria import CRITERIA, normalised, scores
from ...agent.learning.natural_evolution import NetworkAgentSettings
from ...agent.policies.distributions import top_mask
from ...envs.observation import STATISTIC_NAMES
from ...envs.one_shot import OneShotTask
from ...envs.repair.reconstruction_error import ERROR_IMAGES, RECONSTRUCTION, reconstruction_scores
from ...envs.surgery.cutoff import keep_best, spread_evenly
from ...envs.surgery.meters import MacsMeter, removed
from ...envs.surgery.targets import Constraints, Target
from ...envs.task import PruningTask
from ...errors import UserError
from ..pruning.agent_places import PRETRAINED
from ..pruning.decide import observation_tensors
from ..pruning.network_search import best_of, projection
from ..pruning.pretrained import described, load_pretrained, pretrained_scores
from ..runs.seeds import derive_seed

Masks = dict[str, Tensor]
PEERS = ("torch-pruning", "torch-pruning-global")  # uniform, global
FINALISTS = NetworkAgentSettings().top_k + 1  # of a random search: an agent's greedy mask and its best sampled ones
MEAN_RANKED = ("l1", "taylor")
LOWEST_WEIGHT = 0.2  # of a layer in a random allocation; the highest is 1
AGENT, FOLLOWS = "agent", "-at-agent"


class Method(Protocol):
    """Chooses what the groups of a task keep.

    `name` is what tables call it. A method may have `facts`, a mapping of JSON-able values about its last choice;
    "mask_evaluations" says how many masks it evaluated on the reward split.
    """

    name: str

    def choose(self, task: PruningTask, target: Target, seed: int) -> Masks:
        """Masks (N,) bool by group name that meet `target`; never touches the report split."""
        ...


def meter_of(task: PruningTask, target: Target) -> MacsMeter:
    """Counts the MACs that `target` refers to."""
    return MacsMeter(task.model, task.cost, task.groups, target.of)


class Observations:
    """What criteria read, kept for every seed: one pass over the images per layer."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], dict[str, dict[str, Tensor]]] = {}

    def of(self, task: PruningTask) -> Mapping[str, dict[str, Tensor]]:
        """Weights and statistics of every group."""
        key = (id(task.model), task.seed)
        if key not in self._seen:
            self._seen[key] = {group.name: observation_tensors(task.layer(group.name)) for group in task.groups}
        return self._seen[key]


class CriterionMethod:
    """A criterion at a MACs target.

    Args:
        criterion: one of `keepdrop.agent.criteria.CRITERIA`.
        allocation: "uniform" keeps the same fraction of every layer, "global" ranks all filters of all layers by their
            scores, l2-normalised in each layer (the paper's; it prefers narrow layers), "global-mean" by their scores
            divided by the layer's mean, in which its width leaves no trace.
        observations: shared by all criteria.
    """

    def __init__(self, criterion: str, allocation: str, observations: Observations) -> None:
        self.criterion, self.allocation, self.observations = criterion, allocation, observations
        self.name = f"{criterion}-{allocation}"

    def choose(self, task: PruningTask, target: Target, seed: int) -> Masks:
        """Rank and cut off."""
        ranking = {}
        for name, score in criterion_scores(self.criterion, self.observations.of(task), seed).items():
            ranking[name] = spread_evenly(score) if self.allocation == "uniform" else normalised(score, self.criterion)
            if self.allocation == "global-mean":
                ranking[name] /= ranking[name].mean().clamp_min(1e-12)
        return keep_best(task.constraints(target), ranking)


class ReconstructionMethod:
    """The `reconstruction` criterion: filters go where the loss is expected to pay least per MAC; nothing is searched.

    Args:
        images: of the fit split, on which errors are measured.
    """

    name = RECONSTRUCTION

    def __init__(self, images: int = ERROR_IMAGES) -> None:
        self.images = images

    def choose(self, task: PruningTask, target: Target, seed: int) -> Masks:
        """Measure, cut a part, repair, measure again; the seed is the task's."""
        goal, (images, labels) = task.constraints(target), task.fit_images(self.images)
        found = reconstruction_scores(task.model, goal, images, labels, objective=task.objective)
        return keep_best(goal, found)


class PretrainedMethod:
    """An agent that was trained over other networks (`keepdrop pretrain`); it is asked, nothing is searched.

    Args:
        where: it lies, as for `load_pretrained`.
    """

    name = PRETRAINED

    def __init__(self, where: str = PRETRAINED) -> None:
        self.where = where

    def choose(self, task: PruningTask, target: Target, seed: int) -> Masks:
        """Describe the network at the target and ask; the seed is the task's."""
        one_shot = OneShotTask(task, None)
        scores, _ = pretrained_scores(load_pretrained(self.where), described(one_shot, target))
        return one_shot.named(projection(one_shot, target)(scores))


class AtAgentCounts:
    """A criterion that keeps as many filters of every layer as the agent does.

    Args:
        criterion: one of `keepdrop.agent.criteria.CRITERIA`.
        observations: shared by all criteria.
        agent: what the agent chose for the same task, target and seed.
    """

    def __init__(
        self, criterion: str, observations: Observations, agent: Callable[[PruningTask, Target, int], Masks]
    ) -> None:
        self.criterion, self.observations, self.agent = criterion, observations, agent
        self.name = f"{criterion}{FOLLOWS}"

    def choose(self, task: PruningTask, target: Target, seed: int) -> Masks:
        """The best filters at the agent's counts."""
        counts = {name: int(keep.sum()) for name, keep in self.agent(task, target, seed).items()}
        found = criterion_scores(self.criterion, self.observations.of(task), seed)
        return {name: top_mask(score, counts[name]) for name, score in found.items()}


class RandomBest:
    """The best of many random allocations with random masks, evaluated on the reward split like an agent's.

    Every layer gets a random weight, the kept fractions are proportional to the weights and meet the target together.

    Args:
        inside: the criterion that ranks the filters of a layer; "random" for random masks.
        observations: shared by all criteria.
        tasks: of a network, the decision as a search evaluates it, with a coarse repair, and the exact one for its
            finalists; the agent uses the same two.
        evaluations: how many masks are evaluated for a task, target and seed.
        images: of the reward split per mask in the search, the same ones for all; None takes all.
    """

    def __init__(
        self,
        inside: str,
        observations: Observations,
        tasks: Callable[[PruningTask], tuple[OneShotTask, OneShotTask]],
        evaluations: Callable[[PruningTask, Target, int], int],
        images: int | None,
    ) -> None:
        self.inside, self.observations, self.tasks = inside, observations, tasks
        self.evaluations, self.images = evaluations, images
        self.name = "random-best" if inside == "random" else f"{inside}-random-best"
        self.facts: dict[str, Any] = {}

    def choose(self, task: PruningTask, target: Target, seed: int) -> Masks:
        """Draw and evaluate masks, evaluate the best again on all images, keep the best (the first of equal ones)."""
        generator = torch.Generator().manual_seed(derive_seed(seed, self.name))
        (quick, exact), goal = self.tasks(task), task.constraints(target)
        count = self.evaluations(task, target, seed)
        some = None if self.images is None else torch.randperm(quick.n_images, generator=generator)[: self.images]
        n_finalists = min(FINALISTS, max(1, count // 2))
        found: list[tuple[float, Tensor]] = []
        for _ in range(max(1, count - n_finalists)):
            keep = quick.joined(self._draw(task, goal, generator))
            found.append((quick.outcomes(keep[None], some)[0].pruned_accuracy, keep))
        found.sort(key=lambda pair: -pair[0])
        finalists = [keep for _, keep in found[:n_finalists]]
        best, accuracies = best_of(exact, finalists)
        self.facts = {"mask_evaluations": len(found) + len(accuracies), "judged_accuracy": accuracies[best]}
        return exact.named(finalists[best])

    def _draw(self, task: PruningTask, goal: Constraints, generator: torch.Generator) -> Masks:
        ranking = {}
        for group in task.groups:
            weight = LOWEST_WEIGHT + (1 - LOWEST_WEIGHT) * float(torch.rand((), generator=generator))
            if self.inside == "random":
                order = torch.rand(group.n_filters, generator=generator)
            else:
                order = scores(self.observations.of(task)[group.name], STATISTIC_NAMES, self.inside)
            ranking[group.name] = spread_evenly(order, weight)
        return keep_best(goal, ranking)


def criterion_scores(criterion: str, observed: Mapping[str, dict[str, Tensor]], seed: int) -> Masks:
    """Scores (N,) of every group, by name."""
    found = {}
    for name, observation in observed.items():
        generator = torch.Generator().manual_seed(derive_seed(seed, criterion, name))
        found[name] = scores(observation, STATISTIC_NAMES, criterion, generator)
    return found


def method_names() -> list[str]:
    """Every method that can be asked for; the agent and those that follow it come first."""
    classic = [name for name in CRITERIA if name != "random"]
    names = [AGENT, *(f"{name}{FOLLOWS}" for name in CRITERIA)]
    names += [f"{name}-{allocation}" for allocation in ("uniform", "global") for name in classic]
    names += [f"{name}-global-mean" for name in MEAN_RANKED]
    return [*names, RECONSTRUCTION, PRETRAINED, "random-uniform", "random-best", "taylor-random-best", *PEERS]


def check_masks(method: str, task: PruningTask, target: Target, masks: Masks) -> float:
    """The fraction of MACs that masks remove; UserError for masks that are none, or miss the target."""
    for group in task.groups:
        keep = masks.get(group.name)
        shape = None if keep is None else (keep.dtype, tuple(keep.shape), bool(keep.any()))
        if shape != (torch.bool, (group.n_filters,), True):
            raise UserError(
                f"Method {method!r} gave {shape or 'nothing'} for {group.name!r}; expected a bool mask of "
                f"{group.n_filters} filters that keeps at least one."
            )
    return removed(meter_of(task, target), [int(masks[group.name].sum()) for group in task.groups])
