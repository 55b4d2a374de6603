"""One agent for a whole network: trained to keep the most accuracy at a MACs target."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...agent.learning.natural_evolution import NetworkAgentSettings, NetworkTrainer, Project
from ...agent.policies.network import NetworkPolicy
from ...atomic import write_atomically
from ...envs.filter_pruning import FilterPruningVectorEnv
from ...envs.observation import STATISTIC_NAMES
from ...envs.one_shot import OneShotTask
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.surgery.macs_target import SLACK, MacsMeter, Target, keep_best
from ...errors import UserError
from ...rewards.outcome import Outcome, Reward
from ..runs.seeds import derive_seed

STEP = 0.01  # of the MACs
Report = Callable[[NetworkTrainer, Mapping[str, float]], None]


def kept_accuracy(outcome: Outcome) -> Reward:
    """The reward where every mask meets the target: accuracy, relative to the base's."""
    return Reward(outcome.pruned_accuracy / outcome.base_accuracy, {})


@dataclass(frozen=True)
class NetworkSearchSettings:
    """What one update costs, and where the order of the filters starts.

    Args:
        masks: an update, even.
        images: of the reward split, the same ones for all masks of an update; None takes all.
        repair_images, repair_places: what the repair of a searched mask is measured on; coarser than that of the
            final cut, it ranks masks as well at a third of the cost.
        warm_start: the statistic that ranks the filters at the start.
        agent: how the agent learns.
    """

    masks: int = 10
    images: int | None = 300
    repair_images: int = 512
    repair_places: int = 16
    warm_start: str = "l2"
    agent: NetworkAgentSettings = field(default_factory=NetworkAgentSettings)

    def __post_init__(self) -> None:
        if self.masks < 4 or self.masks % 2:
            raise UserError(f"network_search.masks is {self.masks}; expected an even number of 4 or more.")

    def rough(self, repair: ReconstructionSettings | None) -> ReconstructionSettings | None:
        """The repair of searched masks, never finer than that of the final cut."""
        if repair is None:
            return None
        images, places = min(self.repair_images, repair.images), min(self.repair_places, repair.places)
        return replace(repair, images=images, places=places)


class NetworkAgent:
    """Trains an agent that decides on all groups together.

    Args:
        settings: of the search.
        judge: judges the final cut; searched ones are repaired as `settings.rough` says.
        report: told about every update.
        state: file that keeps the training after every update; an existing one is gone on with.

    After `choose`, `policy` is the trained one and `facts` says, JSON-able, how the search went.
    """

    def __init__(
        self,
        settings: NetworkSearchSettings,
        one_shot: OneShotTask,
        report: Report | None = None,
        state: Path | None = None,
    ) -> None:
        self.settings, self.one_shot = settings, one_shot
        self.report = report
        self.state = state
        self.facts: dict[str, Any] = {}
        self.policy: NetworkPolicy | None = None

    def choose(self, target: Target, seed: int) -> dict[str, Tensor]:
        """Masks (N,) bool by group name that meet `target`."""
        settings = self.settings
        one_shot = self.one_shot.with_repair(settings.rough(self.one_shot.repair))
        env = FilterPruningVectorEnv(one_shot, kept_accuracy, settings.masks, settings.images)
        policy = NetworkPolicy(len(one_shot.groups), len(STATISTIC_NAMES), settings.warm_start, STATISTIC_NAMES)
        generator = torch.Generator().manual_seed(derive_seed(seed, "policies"))
        trainer = NetworkTrainer(env, policy, projection(one_shot, target), settings.agent, generator)
        self._train(trainer, env, seed)
        self.policy = policy
        return one_shot.named(self._settle(trainer))

    def _train(self, trainer: NetworkTrainer, env: FilterPruningVectorEnv, seed: int) -> None:
        if self.state is not None and self.state.is_file():
            trainer.load_state_dict(torch.load(self.state, weights_only=True))
        while not trainer.done:
            # Seeded anew for every update: a resumed training draws the images it would have drawn.
            env.reset(seed=derive_seed(seed, "images", str(len(trainer.history))))
            metrics = trainer.step()
            if self.state is not None:
                _keep(trainer.state_dict(), self.state)
            if self.report is not None:
                self.report(trainer, metrics)

    def _settle(self, trainer: NetworkTrainer) -> Tensor:
        """The mean policy's mask or one of the best sampled ones, whichever the whole reward split prefers."""
        candidates = [trainer.mask(), *(scored.mask for scored in trainer.best.masks)]
        best, accuracies = best_of(self.one_shot, candidates)
        searched = len(trainer.history) * self.settings.masks
        images = self.settings.images or self.one_shot.n_images
        self.facts = {
            "mask_evaluations": searched + len(candidates),
            "mask_images": searched * images + len(candidates) * self.one_shot.n_images,
            "decided_by": "agent" if best == 0 else "best sampled mask",
            "greedy_accuracy": accuracies[0],
            "judged_accuracy": accuracies[best],
            "reward_curve": [metrics["reward_mean"] for metrics in trainer.history],
        }
        return candidates[best]


def best_of(one_shot: OneShotTask, candidates: Sequence[Tensor]) -> tuple[int, list[float]]:
    """Which of the masks (N,) does best on the whole reward split, the first of equals, and all their accuracies."""
    accuracies = [outcome.pruned_accuracy for outcome in one_shot.outcomes(torch.stack(list(candidates)))]
    return accuracies.index(max(accuracies)), accuracies


def projection(one_shot: OneShotTask, target: Target) -> Project:
    """Makes scores of all filters the mask that just meets a MACs target and holds the limits of the surgery."""
    task = one_shot.task
    meter = MacsMeter(task.model, task.cost, one_shot.groups, target.of)
    sizes = [group.n_filters for group in one_shot.groups]

    def meets(masks: Mapping[str, Tensor]) -> bool:
        return meter.removed([int(masks[group.name].sum()) for group in one_shot.groups]) >= target.removed - SLACK

    def project(scores_N: Tensor) -> Tensor:
        by_name = {group.name: each for group, each in zip(one_shot.groups, scores_N.split(sizes), strict=True)}
        aim = target.removed
        while aim < 1:
            masks = keep_best(meter, by_name, replace(target, removed=aim))
            allowed = {layer.group.name: layer.allowed(masks[layer.group.name][None])[0] for layer in one_shot.layers}
            if meets(allowed):
                return one_shot.joined(allowed)
            aim += STEP  # what the limits took back has to go elsewhere
        raise UserError(
            f"{100 * target.removed:g} % of the MACs cannot be removed under surgery.round_to, min_kept and protect; "
            "lower them or give a smaller target."
        )

    return project


def _keep(state: dict[str, Any], path: Path) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(path, content.getvalue())
