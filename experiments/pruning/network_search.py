"""One agent for a whole network: trained to keep the most accuracy at a target (MACs, time, parameters, bytes)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...agent.criteria import CRITERIA
from ...agent.criteria import scores as criterion_scores
from ...agent.learning.natural_evolution import NetworkAgentSettings, NetworkTrainer, Project
from ...agent.policies.network import NetworkPolicy
from ...atomic import write_atomically
from ...envs.filter_pruning import FilterPruningVectorEnv
from ...envs.observation import STATISTIC_NAMES
from ...envs.one_shot import OneShotTask
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.repair.reconstruction_error import RECONSTRUCTION
from ...envs.surgery.cutoff import keep_best, spread_evenly
from ...envs.surgery.targets import Constraints, Target
from ...errors import UserError
from ...ranges import COUNT, IMAGES, MASKS, check_numbers
from ...rewards.outcome import Outcome, Reward
from ..runs.seeds import derive_seed
from .agent_places import PRETRAINED, is_place
from .decide import observation_tensors
from .halving import Candidate, Halving, HalvingSettings, Result, Training
from .pretrained import described, load_pretrained, pretrained_scores

STEP = 0.01  # of what has to go
NEARER = 0.4  # of what is missing, where that is more
ROUGH_SAMPLES = 14.0  # per weight of a filter: regressions of searched masks gain little from more
WIDER = 16  # channels that a width is looked for above
UNIFORM = "uniform"
STARTS = (RECONSTRUCTION, UNIFORM, PRETRAINED)
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
        repair_images, repair_places: what the repair of a searched mask is measured on, `ROUGH_SAMPLES` per weight of
            a filter at most; coarser than that of the final cut, it ranks masks as well at a third of the cost.
        warm_start: the statistic that ranks the filters at the start.
        start: how much of each layer the untrained agent keeps: what "reconstruction" does, the criterion that needs
            no search, the same fraction everywhere ("uniform"), or what an agent says that was trained over other
            networks: keepdrop's own ("pretrained"), or that of a folder or of hf://OWNER/NAME.
        agent: how the agent learns.
        halving: which of the best masks are trained before one of them decides; none by default.
    """

    masks: int = 10
    images: int | None = 300
    repair_images: int = 512
    repair_places: int = 16
    warm_start: str = "l2"
    start: str = RECONSTRUCTION
    agent: NetworkAgentSettings = field(default_factory=NetworkAgentSettings)
    halving: HalvingSettings = field(default_factory=HalvingSettings)

    def __post_init__(self) -> None:
        if self.masks < 4 or self.masks % 2:
            raise UserError(f"network_search.masks is {self.masks}; expected an even number of 4 or more.")
        if self.start not in STARTS and not is_place(self.start):
            raise UserError(
                f"network_search.start is {self.start!r}; expected one of {', '.join(STARTS)}, or the place of an "
                "agent that keepdrop pretrain trained."
            )
        check_numbers(self, masks=MASKS, images=IMAGES, repair_images=IMAGES, repair_places=COUNT)

    @property
    def reads(self) -> str | None:
        """Where the agent lies that says how the search starts; None where none does."""
        return None if self.start in (RECONSTRUCTION, UNIFORM) else self.start

    def rough(self, repair: ReconstructionSettings | None) -> ReconstructionSettings | None:
        """The repair of searched masks, never finer than that of the final cut."""
        if repair is None:
            return None
        images, places = min(self.repair_images, repair.images), min(self.repair_places, repair.places)
        per_weight = min(ROUGH_SAMPLES, repair.per_weight or ROUGH_SAMPLES)
        return replace(repair, images=images, places=places, per_weight=per_weight)


class NetworkAgent:
    """Trains an agent that decides on all groups together.

    Args:
        settings: of the search.
        one_shot: evaluates the final cut; searched ones are repaired as `settings.rough` says.
        report: told about every update.
        state: file that keeps the training after every update, and what halving has found; an existing one is resumed.
        training: of candidates, if `settings.halving` wants that.

    After `choose`, `policy` is the trained one and `facts` says, JSON-able, how the search went.
    """

    def __init__(
        self,
        settings: NetworkSearchSettings,
        one_shot: OneShotTask,
        report: Report | None = None,
        state: Path | None = None,
        training: Training | None = None,
    ) -> None:
        self.settings, self.one_shot = settings, one_shot
        self.report, self.training = report, training or Training()
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
        controls = {f"{UNIFORM} {settings.warm_start}": trainer.mask()}
        seen = described(one_shot, target)
        if seen.reconstruction_ranking is not None:
            controls[RECONSTRUCTION] = trainer.project(one_shot.joined(seen.reconstruction_ranking))
        if settings.start == RECONSTRUCTION and RECONSTRUCTION in controls:
            kept = [float(part.double().mean()) for part in one_shot.choices(controls[RECONSTRUCTION]).values()]
            with torch.no_grad():
                policy.log_weight.copy_(torch.tensor(kept, dtype=torch.float64).log())
        if settings.reads is not None:
            scores, log_weight = pretrained_scores(load_pretrained(settings.reads), seen)
            controls[PRETRAINED] = trainer.project(scores)
            with torch.no_grad():
                policy.log_weight.copy_(log_weight)
        if settings.halving.on:
            controls |= self._criteria(trainer.project)
        results = self._train(trainer, env, seed)
        self.policy = policy
        halving = Halving(settings.halving, self.one_shot, self.training, seed, results)
        if self.state is not None:
            state = self.state
            halving.keep = lambda results: _keep({**trainer.state_dict(), "halving": results}, state)
        return one_shot.named(self._settle(trainer, controls, halving))

    def _criteria(self, project: Project) -> dict[str, Tensor]:
        """Every criterion's filters, the same fraction of every layer; the search's warm start is there already."""
        seen = [observation_tensors(layer) for layer in self.one_shot.layers]
        found = {}
        for name in CRITERIA:
            if name not in ("random", self.settings.warm_start):
                of_layers = [spread_evenly(criterion_scores(each, STATISTIC_NAMES, name)) for each in seen]
                found[f"{UNIFORM} {name}"] = project(torch.cat(of_layers))
        return found

    def _train(self, trainer: NetworkTrainer, env: FilterPruningVectorEnv, seed: int) -> list[Result]:
        """All updates; returns what an interrupted halving had found."""
        results: list[Result] = []
        if self.state is not None and self.state.is_file():
            try:
                state = torch.load(self.state, weights_only=True)
                trainer.load_state_dict(state)
                results = [dict(each) for each in state.get("halving", [])]
            except Exception as error:  # torch's reader raises almost anything
                raise UserError(
                    f"The search so far, {str(self.state)!r}, is damaged; delete it to begin the search anew."
                ) from error
        while not trainer.done:
            # Seeded anew for every update: a resumed training draws the images it would have drawn.
            env.reset(seed=derive_seed(seed, "images", str(len(trainer.history))))
            metrics = trainer.step()
            if self.state is not None:
                _keep(trainer.state_dict(), self.state)
            if self.report is not None:
                self.report(trainer, metrics)
        return results

    def _settle(self, trainer: NetworkTrainer, controls: Mapping[str, Tensor], halving: Halving) -> Tensor:
        """The mean policy's mask, one of the best sampled ones or a control, whichever the whole reward split prefers.

        So the decision is never worse there than a choice that needs no search: repaired, or after the last rung of
        halving, which trains the best ones of them all.
        """
        sampled = [scored.mask for scored in trainer.best.masks]
        candidates = [trainer.mask(), *sampled, *controls.values()]
        names = ["agent", *["best sampled mask"] * len(sampled), *controls]
        best, accuracies = best_of(self.one_shot, candidates)
        searched = len(trainer.history) * self.settings.masks
        images = self.settings.images or self.one_shot.n_images
        self.facts = {
            "mask_evaluations": searched + len(candidates),
            "mask_images": searched * images + len(candidates) * self.one_shot.n_images,
            "decided_by": names[best],
            "control_accuracy": dict(zip(controls, accuracies[len(candidates) - len(controls) :], strict=True)),
            "greedy_accuracy": accuracies[0],
            "judged_accuracy": accuracies[best],
            "reward_curve": [metrics["reward_mean"] for metrics in trainer.history],
        }
        if not self.settings.halving.on:
            return candidates[best]
        found = zip(names, candidates, accuracies, strict=True)
        return self._after_training([Candidate(*each, control=each[0] in controls) for each in found], halving)

    def _after_training(self, candidates: Sequence[Candidate], halving: Halving) -> Tensor:
        """The mask that halving prefers; of the criteria the best one is trained. Adds what was found to the facts."""
        criteria = [each for each in candidates if each.control and each.name not in (RECONSTRUCTION, PRETRAINED)]
        known = {f"{UNIFORM} {self.settings.warm_start}", max(criteria, key=lambda each: each.repaired).name}
        best = halving.best([each for each in candidates if each not in criteria or each.name in known])
        self.facts |= {
            "decided_by": best.name,
            "judged_accuracy": best.repaired,
            "trained_accuracy": best.accuracy,
            "halving": halving.rungs,
        }
        return best.mask


def best_of(one_shot: OneShotTask, candidates: Sequence[Tensor]) -> tuple[int, list[float]]:
    """Which of the masks (N,) does best on the whole reward split, the first of equals, and all their accuracies."""
    accuracies = [outcome.pruned_accuracy for outcome in one_shot.outcomes(torch.stack(list(candidates)))]
    return accuracies.index(max(accuracies)), accuracies


def projection(one_shot: OneShotTask, target: Target) -> Project:
    """Makes scores of all filters the mask that just meets a target and holds the limits of the surgery."""
    goal = one_shot.task.constraints(target)
    sizes = [group.n_filters for group in one_shot.groups]

    def project(scores_N: Tensor) -> Tensor:
        by_name = {group.name: each for group, each in zip(one_shot.groups, scores_N.split(sizes), strict=True)}
        aim, nearly = goal, None
        while aim.removed < 1:
            masks = keep_best(aim, by_name)
            allowed = {layer.group.name: layer.allowed(masks[layer.group.name][None])[0] for layer in one_shot.layers}
            allowed = _widened(goal, one_shot, allowed, by_name)
            kept = [int(allowed[group.name].sum()) for group in one_shot.groups]
            missing = goal.missing(kept)
            if missing <= 0:
                return one_shot.joined(allowed)
            if nearly is None and goal.holds(kept):
                nearly = allowed
            # What the limits took back, or slow widths take, has to go elsewhere.
            aim = aim.tightened(kept, max(STEP, NEARER * missing))
        if nearly is not None:
            return one_shot.joined(nearly)
        raise UserError(
            f"A target of {target} cannot be met under surgery.round_to, min_kept and protect; lower them or ask for "
            "less."
        )

    return project


def _widened(
    goal: Constraints, one_shot: OneShotTask, masks: Mapping[str, Tensor], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The masks with wider layers where these take no more time; as they are without a target of time.

    A ranking is cut off by what the fastest widths take that are no smaller, and limits round widths down.
    """
    masks = dict(masks)
    if not goal.is_stepped:
        return masks
    limits, model = one_shot.task.limits, one_shot.task.model
    kept = [int(masks[group.name].sum()) for group in one_shot.groups]
    for place, group in enumerate(one_shot.groups):
        wider = range(kept[place] + 1, kept[place] + 1 + WIDER if kept[place] else 0)
        counts = [n for n in limits.counts(model, group) if n in wider and (n % 2 == 0 or n == group.n_filters)]
        choices = [[*kept[:place], n, *kept[place + 1 :]] for n in counts]
        choices = [more for more in choices if all(each.holds(more) for each in goal.each if each.holds(kept))]
        best = min(choices, key=lambda more: (goal.seconds(more), -more[place]), default=kept)
        if best is not kept and goal.seconds(best) <= goal.seconds(kept):
            keep = masks[group.name] = masks[group.name].clone()
            order = scores[group.name].masked_fill(keep, -torch.inf).argsort(descending=True, stable=True)
            keep[order[: best[place] - kept[place]]] = True
            kept = best
    return masks


def _keep(state: dict[str, Any], path: Path) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(path, content.getvalue())
