"""Successive halving: the best masks of a search are trained briefly, and fewer of them longer; the best one decides.

Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (arXiv 1502.07943,
algorithm 1). Deviations: numbers of candidates and minibatches are given, not derived from a budget; every rung trains
anew from the network as cut and repaired, so that each training has a whole schedule, its rate falling to zero, which a
short one needs to end better than it began; and the best control is never dropped.

Shapes: N filters of all groups together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from ...envs.evaluation.mask_evaluator import accuracy_on
from ...envs.one_shot import OneShotTask
from ...errors import UserError
from ...ranges import COUNT, check_numbers
from ..runs.seeds import derive_seed
from ..training.augment import Augment
from ..training.loop import DivergedError, FitOptions, fit_network, steps_of
from ..training.rate import bearable_rate
from ..training.teaching import Remembering
from ..training.train_settings import TrainSettings

Result = dict[str, Any]


@dataclass(frozen=True)
class HalvingSettings:
    """Which of a search's masks are trained before one of them decides, and for how long.

    Args:
        candidates: distinct masks trained in each rung, the best ones of the rung before, such as [8, 3]; every control
            is in the first rung and the best one in all. [] trains none: the accuracy as repaired decides.
        minibatches: that each candidate of a rung is trained on, from the network as repaired.
    """

    candidates: list[int] = field(default_factory=list)
    minibatches: list[int] = field(default_factory=lambda: [50, 200])

    def __post_init__(self) -> None:
        sizes, lengths = list(self.candidates), list(self.minibatches)
        check_numbers(self, candidates=COUNT, minibatches=COUNT)
        if sizes and len(sizes) != len(lengths):
            raise UserError(
                f"network_search.halving has candidates {sizes} and minibatches {lengths}; expected as many numbers in "
                "one as in the other, one for each rung."
            )
        if sizes and (min(sizes) < 2 or any(now <= later for now, later in pairwise(sizes))):
            raise UserError(
                f"network_search.halving.candidates is {sizes}; expected falling numbers of 2 or more, such as [8, 3]."
            )
        if sizes and any(now >= later for now, later in pairwise(lengths)):
            raise UserError(
                f"network_search.halving.minibatches is {lengths}; expected rising numbers, such as [50, 200]."
            )

    @property
    def on(self) -> bool:
        """Whether candidates are trained at all."""
        return bool(self.candidates)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A mask (N,) bool, what found it, and its accuracy on the reward split, repaired and at last trained."""

    name: str
    mask: Tensor
    repaired: float
    control: bool = False
    accuracy: float = -1.0

    @property
    def key(self) -> str:
        """Equal for equal masks."""
        return hashlib.sha256(self.mask.cpu().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Trained:
    """What is told of a candidate that was trained: which, how long, how many of all are done."""

    candidate: Candidate
    minibatches: int
    done: int
    total: int

    def __str__(self) -> str:
        then, now = self.candidate.repaired, self.candidate.accuracy
        better = f"{100 * now:.1f} %" if now > then else "no better"
        return f"{self.candidate.name}: {100 * then:.1f} % repaired, {better} after {self.minibatches} minibatches"


@dataclass(frozen=True)
class Training:
    """How candidates are trained: as the run's fine-tuning trains, but for a few minibatches at a rate they bear.

    Args:
        settings: of that fine-tuning; its `epochs` are not looked at, and its highest rate is lowered to what so few
            steps can use.
        augment: of the fit images.
        report: told about every candidate.
    """

    settings: TrainSettings = field(default_factory=lambda: TrainSettings(batch_size=64, distill_weight=0.5))
    augment: Augment | None = None
    report: Callable[[Trained], None] | None = None


class Halving:
    """Trains candidates, rung after rung, and says which one is best on the whole reward split.

    Args:
        settings: rungs.
        one_shot: cuts and repairs as the final cut is.
        training: how each is trained; all of them on the same images in the same order.
        seed: of that order.
        results: of an interrupted run, as `keep` was given them.
        keep: called after every training with the results so far, JSON-able.

    After `best`, `rungs` is a JSON-able record of every candidate.
    """

    def __init__(
        self,
        settings: HalvingSettings,
        one_shot: OneShotTask,
        training: Training,
        seed: int,
        results: Iterable[Result] = (),
        keep: Callable[[list[Result]], None] = lambda results: None,
    ) -> None:
        self.settings, self.one_shot, self.training = settings, one_shot, training
        self.seed = derive_seed(seed, "halving")
        self.results, self.keep = list(results), keep
        self.rungs: list[dict[str, Any]] = []
        dense = one_shot.task.model
        self.teacher = Remembering(dense) if training.settings.distill_weight > 0 else None

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """The best one after the last rung; of equal ones the one that stands first."""
        left = _distinct(candidates)
        forced = [each for each in left if each.control]
        rungs = list(zip(self.settings.candidates, self.settings.minibatches, strict=True))
        for number, (size, minibatches) in enumerate(rungs):
            left = _admitted(left, size, forced)
            later = [min(size, len(left)) for size, _ in rungs[number + 1 :]]
            left = self._rung(left, minibatches, sum(later))
            forced = [each for each in left if each.control][:1]
        return left[0]

    def _rung(self, candidates: Sequence[Candidate], minibatches: int, later: int) -> list[Candidate]:
        """All of them trained, the best first; `later` trainings follow in other rungs."""
        done, trained = sum(len(rung["candidates"]) for rung in self.rungs), []
        total = done + len(candidates) + later
        for number, each in enumerate(candidates, start=1):
            trained.append(self._trained(each, minibatches))
            if self.training.report is not None:
                self.training.report(Trained(trained[-1], minibatches, done + number, total))
        trained.sort(key=lambda each: -each.accuracy)
        self.rungs.append({"minibatches": minibatches, "candidates": [_facts(each) for each in trained]})
        return trained

    def _trained(self, candidate: Candidate, minibatches: int) -> Candidate:
        """The candidate with its accuracy after a training; as repaired, if the training made it worse."""
        asked: Result = {"mask": candidate.key, "minibatches": minibatches}
        known = next((each for each in self.results if asked.items() <= each.items()), None)
        if known is None:
            known = {**asked, "accuracy": self._accuracy(candidate, minibatches)}
            self.results.append(known)
            self.keep(self.results)
        return replace(candidate, accuracy=max(candidate.repaired, known["accuracy"]))

    def _accuracy(self, candidate: Candidate, minibatches: int) -> float:
        model, task = self.one_shot.cut(candidate.mask), self.one_shot.task
        fit, settings = task.splits.fit, self.training.settings
        an_epoch = steps_of(fit, replace(settings, epochs=1))
        settings = replace(settings, epochs=minibatches / an_epoch, lr=None, top_lr=settings.rate)
        options: FitOptions = {
            "seed": self.seed,
            "augment": self.training.augment,
            "teacher": self.teacher,
            "device": task.device,
        }
        try:
            rate = bearable_rate(model, fit, settings, **options)
            fit_network(model, fit, replace(settings, lr=rate), **options)
        except DivergedError:
            return -1.0
        return accuracy_on(model, task.splits.reward)


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best first, of equal masks the control: no search is needed for that one."""
    found: dict[str, Candidate] = {}
    for each in candidates:
        if each.key not in found or (each.control and not found[each.key].control):
            found[each.key] = each
    return sorted(found.values(), key=lambda each: -each.repaired)


def _admitted(ranked: Sequence[Candidate], size: int, forced: Sequence[Candidate]) -> list[Candidate]:
    """The first `size`, among them the `forced` ones and at least one other; in the order they have."""
    keys = {each.key for each in forced}
    others = [each.key for each in ranked if each.key not in keys][: max(1, size - len(keys))]
    return [each for each in ranked if each.key in keys or each.key in others]


def _facts(candidate: Candidate) -> dict[str, Any]:
    return {"name": candidate.name, "repaired": candidate.repaired, "trained": candidate.accuracy}
