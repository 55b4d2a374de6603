"""Dense baseline: the network before any pruning, measured once, and refused if it only guesses (chance level).

Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..data.metrics import BalancedAccuracy, ClassCounts, classes_of
from ..data.objective import TOP1, Objective
from ..data.splits import Splits
from ..networks.cost import Cost, count_cost
from .mask_evaluator import correct_flags, points_against

SIGMAS = 3  # standard deviations above chance from which on a network is trained
P_VALUE = 0.005  # of a permutation test, where these reach beyond what can be had
GUESSES = 5  # orders of targets that a score of a set has to beat
FEW = 200  # reward images below which chance may be a matter of their number


class GuessingError(UserError):
    """The network answers no better than chance, where an answer could tell."""


@dataclass(frozen=True)
class DenseBaseline:
    """The network before any pruning: measured once, never again.

    `correct` (B,) holds what it got right on the reward split, image by image, or its points under another metric than
    top-1, so that the base accuracy of any subset of these images is exact and free.
    """

    correct: Tensor
    cost: Cost
    objective: Objective = TOP1

    @property
    def accuracy(self) -> float:
        """Fraction in [0, 1] on the whole reward split."""
        return self.objective.fraction(self.correct)


def measure_baseline(model: nn.Module, splits: Splits, device: torch.device | str = "cpu") -> DenseBaseline:
    """Measure the dense network on the reward split; a network that guesses is refused with a `UserError`."""
    images, labels = (value.to(device) for value in splits.reward.batch(torch.arange(len(splits.reward))))
    objective = splits.objective
    by_classes = objective.is_top1 or isinstance(objective.metric, ClassCounts)
    others = [] if by_classes else [_of_others(labels)]
    if objective.is_of_set:
        others = [each.roll(shift, 0) for each in others for shift in range(GUESSES)]
    points, *elsewhere = points_against(model, images, [labels, *others], objective=objective)
    base = DenseBaseline(points, count_cost(model, images[:1]), objective)
    if objective.is_top1:
        _refuse_chance(base, labels.cpu(), model, images)
    elif by_classes:
        _refuse_guessed_classes(base, *classes_of(base.correct))
    elif objective.is_of_set:
        _refuse_guessed_set(base, [objective.fraction(each) for each in elsewhere])
    else:
        _refuse_guessing(base, elsewhere[0], differ=not torch.equal(labels, others[0]))
    return base


def _refuse_chance(base: DenseBaseline, labels: Tensor, model: nn.Module, images: Tensor) -> None:
    """Refuse a network that does no better than the most frequent class, or than its own answers shuffled."""
    chance = float(torch.bincount(labels).max()) / len(labels)
    if base.accuracy > chance + SIGMAS * (chance * (1 - chance) / len(labels)) ** 0.5:
        return
    # The interval above may reach beyond 1 where images are few or most of them of one class: look closely.
    answers = correct_flags(model, images, labels.to(images.device), objective=Objective(BalancedAccuracy()))
    found, shuffled = classes_of(answers)[1], _shuffled(*classes_of(answers))
    accuracy = f"{base.accuracy:.4f}, which is chance level"
    what = f"The base network's accuracy on the {len(labels)} reward images is {accuracy}"
    if chance == 1:
        raise UserError(f"{what}: all of them are of class {int(labels[0])}; give reward images of every class.")
    if len(found.unique()) > 1 and base.accuracy > chance and shuffled.is_beaten:
        return
    if len(found.unique()) > 1 and shuffled.is_beaten:
        raise UserError(
            f"{what} (the most frequent class gives {chance:.4f}), though the answers are no guesses: accuracy says "
            "little where one class is so frequent;",
            python="choose Settings(metric=keepdrop.BalancedAccuracy()) or keepdrop.F1().",
            typed="choose metric=balanced_accuracy or metric=f1.",
        )
    if shuffled.would_be_beaten_by_more and len(labels) < FEW:
        raise UserError(
            f"{what} on so few images (the most frequent class gives {chance:.4f}, the answers in another order "
            f"{shuffled.mean:.4f}); give more reward images, or reward images of more classes."
        )
    raise GuessingError(
        f"{what} (the most frequent class gives {chance:.4f}); expected a trained network: check the checkpoint, "
        "the normalisation (mean and std) and the order of the classes"
        + (f" (it answers class {int(found[0])} to every image)." if len(found.unique()) == 1 else ".")
    )


def _refuse_guessed_classes(base: DenseBaseline, labels: Tensor, found: Tensor) -> None:
    """Refuse answers, classes `found` (B,), that fit their labels (B,) no better than in another order."""
    shuffled = _shuffled(labels, found)
    if len(labels.unique()) > 1 and shuffled.is_beaten:
        return
    raise GuessingError(
        f"The base network's {base.objective.name} on the {len(labels)} reward images is {base.accuracy:.4f}, which is "
        f"chance level ({shuffled.n_right} answers are right, in another order {shuffled.mean * len(labels):.1f}); "
        "expected a trained network, and reward images of every class: check the checkpoint, the normalisation (mean "
        "and std) and the order of the classes."
    )


@dataclass(frozen=True)
class _Shuffled:
    """How many answers are right as they are, and which fraction in a random order (its mean)."""

    n_right: int
    mean: float
    is_beaten: bool
    would_be_beaten_by_more: bool


def _shuffled(labels: Tensor, found: Tensor) -> _Shuffled:
    """Permutation test of answers (B,) against labels (B,): by its exact mean and variance, or by 2,000 permutations.

    The number of right answers among shuffled ones is Hoeffding's statistic (1951, "A combinatorial central limit
    theorem"). Where all answers are right they are no guesses, however few they are, as long as classes differ.
    """
    count, n_classes = len(labels), int(torch.maximum(labels, found).max()) + 1
    ours, theirs = (torch.bincount(each, minlength=n_classes).double() for each in (labels, found))
    pairs = float((ours * theirs).sum())
    spread = pairs - float((ours * theirs * (ours + theirs)).sum()) / count + (pairs / count) ** 2
    mean, deviation = pairs / count, max(0.0, spread / max(1, count - 1)) ** 0.5
    n_right = int((labels == found).sum())
    beaten = n_right > mean + SIGMAS * deviation or n_right == count
    if not beaten and deviation > 0:
        generator = torch.Generator().manual_seed(0)
        orders = (torch.randperm(count, generator=generator) for _ in range(2000))
        as_good = sum(int((labels == found[order]).sum()) >= n_right for order in orders)
        beaten = (1 + as_good) / 2001 <= P_VALUE
    nearly = n_right > mean + SIGMAS / 3 * deviation  # nine times as many images would show it
    return _Shuffled(n_right, mean / count, beaten and deviation > 0, nearly)


def _refuse_guessed_set(base: DenseBaseline, elsewhere: Sequence[float]) -> None:
    """Refuse answers whose score as a set, with other images' targets, is `elsewhere` in some order as high."""
    if base.accuracy <= max(elsewhere):
        raise GuessingError(
            f"The base network's {base.objective.name} on the {len(base.correct)} reward images is "
            f"{base.accuracy:.4f}, and {max(elsewhere):.4f} against other images' targets, which is guessing; expected "
            "a trained network: check the checkpoint, the normalisation (mean and std), the targets and how answers "
            "are read (decode)."
        )


def _of_others(targets: Tensor) -> Tensor:
    """Targets (B, ...) in an order in which no image has its own; random, because images may come sorted by them."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).to(targets.device)
    others = targets.clone()
    others[order] = targets[order.roll(1)]
    return others


def _refuse_guessing(base: DenseBaseline, elsewhere: Tensor, differ: bool) -> None:
    """Refuse answers that fit other images' targets, `elsewhere` (B,) in points, as well as their own.

    `differ` says whether those targets are others at all; where all are alike, nothing can be told.
    """
    gain = (base.correct.double() - elsewhere.double()) / base.objective.unit
    if differ and base.accuracy > 0 and not gain.any():
        raise UserError(
            f"{base.objective.name} scores each of the {len(gain)} reward images the same against another image's "
            f"target as against its own ({base.accuracy:.4f} on average), so it cannot tell right answers from wrong "
            "ones; choose a metric that looks at the targets, and check that it does not ignore the class that "
            "matters (ignore_index) or tolerate every error."
        )
    guesses = bool(gain.any()) and float(gain.mean()) <= 3 * float(gain.std(correction=0)) / len(gain) ** 0.5
    if guesses or base.accuracy == 0:
        raise GuessingError(
            f"The base network's {base.objective.name} on the {len(gain)} reward images is {base.accuracy:.4f}, and "
            f"{base.objective.fraction(elsewhere):.4f} against other images' targets, which is guessing; expected a "
            "trained network: check the checkpoint, the normalisation (mean and std) and the targets."
        )
