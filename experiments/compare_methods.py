"""What is compared: every method as one object that chooses masks of all groups at a MACs target.

Shapes: N filters of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..agent.criteria import CRITERIA, normalised, scores
from ..agent.distributions import top_mask
from ..envs.observation import STATISTIC_NAMES
from ..envs.target import MacsMeter, Target, keep_best, spread_evenly
from ..envs.task import PruningTask
from ..envs.whole_network import NetworkTask
from ..rewards.errors import UserError
from .decide import observation_tensors
from .seeds import derive_seed

Masks = dict[str, Tensor]
PEERS = ("torch-pruning", "torch-pruning-global")  # uniform, global
LOWEST_WEIGHT = 0.2  # of a layer in a random allocation; the highest is 1
AGENT, FOLLOWS = "agent", "-at-agent"


class Method(Protocol):
    """Chooses what the groups of a task keep.

    `name` is what tables call it. A method may have `facts`, a mapping of JSON-able values about its last choice;
    "mask_evaluations" says how many masks it had judged on the reward split.
    """

    name: str

    def choose(self, task: PruningTask, target: Target, seed: int) -> Masks:
        """Masks (N,) bool by group name that meet `target`; never touches the report split."""
        ...


def meter_of(task: PruningTask, target: Target) -> MacsMeter:
    """Counts the MACs that `target` speaks of."""
    return MacsMeter(task.model, task.cost, task.groups, target.of)


class Observations:
    """What criteria read, kept for every seed: one pass over the images a layer."""

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
            scores, l2-normalised in each layer.
        observations: shared by all criteria.
    """

    def __init__(self, criterion: str, allocation: str, observations: Observations) -> None:
        self.criterion, self.allocation, self.observations = criterion, allocation, observations
        self.name = f"{criterion}-{allocation}"

    def choose(self, task: PruningTask, target: Target, seed: int) -> Masks:
        """Rank and cut off."""
        ranking = {}
        for name, score in criterion_scores(self.criterion, self.observations.of(task), seed).items():
            ranking[name] = normalised(score, self.criterion) if self.allocation == "global" else spread_evenly(score)
        return keep_best(meter_of(task, target), ranking, target)


class AtAgentCounts:
    """A criterion that keeps as many filters of every layer as the agent does.

    Args:
        criterion: one of `keepdrop.agent.criteria.CRITERIA`.
        observations: shared by all criteria.
        agent: what the agent chose for the same task, target and seed.
    """

    def __init__(self, criterion: str, observations: Observations, agent: Callable[..., Masks]) -> None:
        self.criterion, self.observations, self.agent = criterion, observations, agent
        self.name = f"{criterion}{FOLLOWS}"

    def choose(self, task: PruningTask, target: Target, seed: int) -> Masks:
        """The best filters at the agent's counts."""
        counts = {name: int(keep.sum()) for name, keep in self.agent(task, target, seed).items()}
        found = criterion_scores(self.criterion, self.observations.of(task), seed)
        return {name: top_mask(score, counts[name]) for name, score in found.items()}


class RandomBest:
    """The best of many random allocations with random masks, judged on the reward split like an agent's.

    Every layer gets a random weight, the kept fractions are proportional to the weights and meet the target together.

    Args:
        inside: the criterion that ranks the filters of a layer; "random" for random masks.
        observations: shared by all criteria.
        evaluations: how many masks are judged for a task, target and seed.
        images: of the reward split, at random for each search; None judges on all.
    """

    def __init__(
        self, inside: str, observations: Observations, evaluations: Callable[..., int], images: int | None
    ) -> None:
        self.inside, self.observations, self.evaluations, self.images = inside, observations, evaluations, images
        self.name = "random-best" if inside == "random" else f"{inside}-random-best"
        self.facts: dict[str, Any] = {}

    def choose(self, task: PruningTask, target: Target, seed: int) -> Masks:
        """Draw, judge, keep the best (the first of equal ones)."""
        generator = torch.Generator().manual_seed(derive_seed(seed, self.name))
        network, meter, count = NetworkTask(task), meter_of(task, target), self.evaluations(task, target, seed)
        some = None if self.images is None else torch.randperm(network.n_images, generator=generator)[: self.images]
        best: Masks = {}
        best_accuracy = -1.0
        for _ in range(count):
            masks = self._draw(task, meter, target, generator)
            rows = [masks[layer.group.name][None] for layer in network.layers]
            accuracy = network.outcomes(rows, some)[0].pruned_accuracy
            if accuracy > best_accuracy:
                best, best_accuracy = masks, accuracy
        self.facts = {"mask_evaluations": count, "judged_accuracy": best_accuracy}
        return best

    def _draw(self, task: PruningTask, meter: MacsMeter, target: Target, generator: torch.Generator) -> Masks:
        ranking = {}
        for group in task.groups:
            weight = LOWEST_WEIGHT + (1 - LOWEST_WEIGHT) * float(torch.rand((), generator=generator))
            if self.inside == "random":
                order = torch.rand(group.n_filters, generator=generator)
            else:
                order = scores(self.observations.of(task)[group.name], STATISTIC_NAMES, self.inside)
            ranking[group.name] = spread_evenly(order, weight)
        return keep_best(meter, ranking, target)


def criterion_scores(criterion: str, observed: Mapping[str, dict[str, Tensor]], seed: int) -> Masks:
    """Scores (N,) of every group, by name."""
    found = {}
    for name, observation in observed.items():
        generator = torch.Generator().manual_seed(derive_seed(seed, criterion, name))
        found[name] = scores(observation, STATISTIC_NAMES, criterion, generator)
    return found


def method_names(with_agent: bool) -> list[str]:
    """Every method that can be asked for, agent and those that follow it last."""
    classic = [name for name in CRITERIA if name != "random"]
    names = [f"{name}-{allocation}" for allocation in ("uniform", "global") for name in classic]
    names += ["random-uniform", "random-best", "taylor-random-best", *PEERS]
    return names + ([AGENT, *(f"{name}{FOLLOWS}" for name in CRITERIA)] if with_agent else [])


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
    return meter_of(task, target).removed([int(masks[group.name].sum()) for group in task.groups])
