"""Metrics: how well one image's answer fits its target, from 0 (not at all) to 1 (perfectly).

Any callable (outputs, targets) -> (B,) is one; a network's score is the mean over images, and takes the place of
accuracy everywhere. `Top1` is the default. Each image is scored by itself: a score must not depend on its batch. What
can be said of a set of images alone (`BalancedAccuracy`, `F1`) is made of an answer per image: `ClassCounts`.

Shapes: B images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import UserError

_known = ContextVar("targets_known", default=False)
MOST_CLASSES = 2**15  # of a metric that keeps an image's class and answer in one int32
Metric = Callable[[Tensor, Tensor], Tensor]
"""Outputs (B, ...) and targets (B, ...) -> one score per image, (B,), in [0, 1], higher is better."""


@dataclass(frozen=True)
class Top1:
    """1 where the largest logit is the label's, else 0: logits (B, C), or one each, (B, 1), for labels 0 and 1."""

    needs_classes: ClassVar[bool] = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C), labels (B,) -> (B,) bool."""
        outputs, targets = as_classes(outputs, targets)
        return outputs.argmax(1) == targets


@dataclass(frozen=True)
class TopK:
    """1 where the label is among the `k` largest logits, else 0: logits (B, C), labels int64 (B,)."""

    k: int = 5
    needs_classes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"Top-k accuracy was given k={self.k}; expected 1 or more.")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C), labels (B,) -> (B,)."""
        outputs, targets = as_classes(outputs, targets)
        if self.k >= outputs.shape[1]:
            raise UserError(
                f"Top-k accuracy was given k={self.k}, and with {outputs.shape[1]} classes every answer is right; "
                "expected fewer than there are classes."
            )
        best = outputs.topk(self.k, dim=1).indices
        return (best == targets[:, None]).any(1)


@dataclass(frozen=True)
class PixelAccuracy:
    """Fraction of an image's pixels whose largest logit is the target's class.

    Logits (B, C, ...), targets int64 (B, ...), or one logit per pixel for targets 0 and 1 (`as_classes`). Pixels whose
    target is `ignore_index` do not count, nor do they in the default loss; an image without any other pixel scores 1.
    """

    ignore_index: int | None = None
    needs_classes: ClassVar[bool] = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C, ...), targets (B, ...) -> (B,)."""
        outputs, targets = as_classes(outputs, targets, ignored=self.ignore_index)
        _check_maps(outputs, targets, self.ignore_index)
        valid = _valid(targets, self.ignore_index).flatten(1)
        right = as_float64(((outputs.argmax(1) == targets).flatten(1) & valid).sum(1))
        n_valid = as_float64(valid.sum(1))
        return torch.where(n_valid > 0, right / n_valid.clamp_min(1), 1.0)


@dataclass(frozen=True)
class MeanIoU:
    """Intersection over union of predicted and target pixels of a class, averaged over classes, image by image.

    Logits (B, C, ...), targets int64 (B, ...), or one logit per pixel for targets 0 and 1 (`as_classes`). Classes that
    occur in neither do not count, nor do pixels whose target is `ignore_index` (nor in the default loss). An image
    without any other pixel scores 1. The mean over images is not the usual figure of a data set, which sums
    intersections and unions over images first and so has no score per image.
    """

    ignore_index: int | None = None
    needs_classes: ClassVar[bool] = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C, ...), targets (B, ...) -> (B,)."""
        outputs, targets = as_classes(outputs, targets, ignored=self.ignore_index)
        _check_maps(outputs, targets, self.ignore_index)
        n_classes = outputs.shape[1]
        valid = _valid(targets, self.ignore_index).flatten(1)
        found = outputs.argmax(1).flatten(1).masked_fill(~valid, n_classes)
        truth = targets.flatten(1).masked_fill(~valid, n_classes)
        both = _counts(found.masked_fill(found != truth, n_classes), n_classes)
        union = _counts(found, n_classes) + _counts(truth, n_classes) - both
        both, union = as_float64(both), as_float64(union)
        fractions = both / union.clamp_min(1)
        present = (union > 0).sum(1)
        return torch.where(present > 0, fractions.sum(1) / present.clamp_min(1), 1.0)


@dataclass(frozen=True)
class BinaryAccuracy:
    """Fraction of an image's yes-or-no answers that are right: one logit each, yes above 0; targets 0 and 1.

    Outputs and targets of one shape up to sides of 1, integer or floating targets: (B,) or (B, 1) for one answer per
    image, (B, L) for L labels, (B, 1, H, W) for a mask. The default loss is binary cross-entropy. `probabilities` says
    that the network puts out probabilities (it ends in a sigmoid).
    """

    probabilities: bool = False
    needs_classes: ClassVar[bool] = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, ...), targets (B, ...) -> (B,)."""
        outputs, targets = as_classes(outputs, targets, self.probabilities)
        return as_float64(outputs.argmax(1) == targets).reshape(len(targets), -1).mean(1)


@dataclass(frozen=True)
class Dice:
    """2 TP / (2 TP + FP + FN) over an image's yes-or-no answers (F1, the Dice coefficient); 1 if nothing is or was yes.

    Outputs, targets and `probabilities` as for `BinaryAccuracy`: several labels per image, or a mask.
    """

    probabilities: bool = False
    needs_classes: ClassVar[bool] = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, ...), targets (B, ...) -> (B,)."""
        outputs, targets = as_classes(outputs, targets, self.probabilities)
        found, truth = ((each == 1).reshape(len(targets), -1) for each in (outputs.argmax(1), targets))
        both, either = as_float64((found & truth).sum(1)), as_float64(found.sum(1) + truth.sum(1))
        return torch.where(either > 0, 2 * both / either.clamp_min(1), 1.0)


class ClassCounts:
    """A metric of a set of images, made of how often each class was answered for each: no mean of scores per image.

    An image's answer is one number, class * 2^15 + answered class; `of_set` makes a score in [0, 1] of the counts.
    """

    needs_classes: ClassVar[bool] = True
    is_of_set: ClassVar[bool] = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C), or one each for labels 0 and 1, and labels (B,) -> answers (B,) int32."""
        outputs, targets = as_classes(outputs, targets)
        if outputs.dim() != 2 or outputs.shape[:1] != targets.shape or outputs.shape[1] > MOST_CLASSES:
            raise UserError(
                f"{type(self).__name__} was given outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}; "
                f"expected one row of at most {MOST_CLASSES} logits and one label per image."
            )
        return (targets * MOST_CLASSES + outputs.argmax(1)).to(torch.int32)

    def of_set(self, answers: Tensor) -> float:
        """The score of the images with these answers (B,), a fraction."""
        truth, found = classes_of(answers)
        n_classes = int(torch.maximum(truth, found).max()) + 1
        right = torch.bincount(truth[truth == found], minlength=n_classes)
        return self._score(right, *(torch.bincount(each, minlength=n_classes) for each in (truth, found)))

    def _score(self, right: Tensor, truth: Tensor, found: Tensor) -> float:
        """The score of counts by class, all (C,): right answers, images, answers."""
        raise NotImplementedError


def classes_of(answers: Tensor) -> tuple[Tensor, Tensor]:
    """Classes and answered classes, (B,) int64 on the CPU, of answers (B,) to `ClassCounts`."""
    answers = answers.cpu().long()
    return answers // MOST_CLASSES, answers % MOST_CLASSES


@dataclass(frozen=True)
class BalancedAccuracy(ClassCounts):
    """Mean accuracy per class: of each class's images the fraction that is right, averaged over classes with images.

    Logits (B, C), labels int64 (B,). A network that always answers the most frequent class scores 1 / C.
    """

    def _score(self, right: Tensor, truth: Tensor, found: Tensor) -> float:
        return float((right[truth > 0].double() / truth[truth > 0]).mean())


@dataclass(frozen=True)
class F1(ClassCounts):
    """2 TP / (2 TP + FP + FN) of a class, averaged over the classes that occur or are answered (macro F1).

    Logits (B, C), labels int64 (B,). `positive` names the one class that counts; it scores 1 where it neither occurs
    nor is answered. The mean over images of an F1 per image is `Dice`, for several yes-or-no answers in each.
    """

    positive: int | None = None

    def __post_init__(self) -> None:
        if self.positive is not None and self.positive < 0:
            raise UserError(f"The metric F1 was given positive={self.positive}; expected a class, 0 or above.")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C), or one each for labels 0 and 1, and labels (B,) -> answers (B,) int32."""
        answers, classes = super().__call__(outputs, targets), max((2, *outputs.shape[1:]))
        if self.positive is not None and self.positive >= classes:
            raise UserError(
                f"The metric F1 was given positive={self.positive}, and the network answers {classes} classes; "
                f"expected 0 to {classes - 1}."
            )
        return answers

    def _score(self, right: Tensor, truth: Tensor, found: Tensor) -> float:
        both = truth + found
        scores = torch.where(both > 0, 2 * right.double() / both.clamp_min(1), 1.0)
        if self.positive is not None:
            return float(scores[self.positive]) if self.positive < len(scores) else 1.0
        return float(scores[both > 0].mean())


@dataclass(frozen=True)
class Within:
    """Fraction of an image's numbers that miss their targets by `tolerance` at most, in the targets' unit.

    Outputs and floating targets of one shape, (B,) or (B, ...); with one number per image it is right or wrong.
    """

    tolerance: float
    needs_numbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf:
            raise UserError(f"The metric Within was given tolerance={self.tolerance}; expected more than 0.")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Outputs (B, ...), targets (B, ...) -> (B,)."""
        return as_float64(_errors(outputs, targets) <= self.tolerance).mean(1)


@dataclass(frozen=True)
class Closeness:
    """1 / (1 + error / scale) with the mean absolute error of an image's numbers: 1 for none, 1/2 at `scale`.

    Outputs and floating targets of one shape, (B,) or (B, ...). Smooth where `Within` jumps: small losses show.
    """

    scale: float
    needs_numbers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise UserError(f"The metric Closeness was given scale={self.scale}; expected more than 0.")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Outputs (B, ...), targets (B, ...) -> (B,)."""
        return 1 / (1 + _errors(outputs, targets).mean(1) / self.scale)


def as_classes(
    outputs: Tensor, targets: Tensor, probabilities: bool = False, ignored: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (B, C, ...) with C >= 2, and the classes (B, ...) int64 that they are about.

    One logit x for each target, which is 0 or 1 (or `ignored`), stands for the two logits (0, x): its cross-entropy is
    the binary one of x. So do one logit for each of several labels, (B, L) -> (B, 2, L). Everything else comes back as
    it is, but for class maps (B, 1, ...), which lose their channel.

    Raises UserError for one logit per target where targets are not 0 and 1.
    """
    if not targets.is_floating_point() and outputs.dim() == targets.dim() + 1 and outputs.shape[1] > 1:
        return outputs, targets
    if not same_sides(outputs, targets):
        channel = targets.dim() == outputs.dim() > 2 and targets.shape[1] == 1 and not targets.is_floating_point()
        return outputs, targets.squeeze(1) if channel else targets
    logits, classes = outputs.reshape(targets.shape), targets
    if targets.dim() > 1 and targets.shape[1] == 1:
        logits, classes = logits.squeeze(1), targets.squeeze(1)
    _check_binary(classes, ignored)
    if probabilities:
        logits = torch.logit(logits.float(), eps=1e-6)
    return torch.stack([torch.zeros_like(logits), logits], 1), classes.long()


def same_sides(outputs: Tensor, targets: Tensor) -> bool:
    """Whether there is one output per target: shapes that differ by sides of 1 only, as (B, 1) and (B,)."""
    ours, theirs = ([side for side in value.shape[1:] if side != 1] for value in (outputs, targets))
    return outputs.shape[:1] == targets.shape[:1] and ours == theirs


@contextmanager
def targets_known(known: bool) -> Iterator[None]:
    """Targets of one logit each are not looked at inside, where all of them are `known` to be 0 and 1.

    To look at them waits for the device that they are on.
    """
    token = _known.set(known)
    try:
        yield
    finally:
        _known.reset(token)


def _check_binary(targets: Tensor, ignored: int | None) -> None:
    if _known.get():
        return
    odd = targets[(targets != 0) & (targets != 1) & _valid(targets, ignored)]
    if odd.numel():
        found = float(odd[0])
        masks = f" (of masks that hold 0 and {found:g}: mask == {found:g})" if found == int(found) else ""
        raise UserError(
            f"The network returns one number per target, and targets hold {found:g}; expected 0 and 1 for one logit "
            f"each{masks}, a logit per class, or a metric for numbers (metric=closeness)."
        )


def as_float64(values: Tensor) -> Tensor:
    """The values in float64, on the device they are on; on the CPU where that device has no float64 (mps)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Absolute errors (B, S), float64."""
    check_one_each(outputs, targets)
    return (as_float64(outputs) - as_float64(targets)).abs().reshape(len(targets), -1)


def check_one_each(outputs: Tensor, targets: Tensor) -> None:
    """UserError unless the outputs have the shape of their targets."""
    if outputs.shape != targets.shape:
        raise UserError(
            f"The network returns {tuple(outputs.shape)} for targets of shape {tuple(targets.shape)}; expected one "
            "number per target."
        )


def _check_maps(outputs: Tensor, targets: Tensor, ignore_index: int | None) -> None:
    if targets.is_floating_point() or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        raise UserError(
            f"The network returns {tuple(outputs.shape)} for targets {targets.dtype} {tuple(targets.shape)}; expected "
            "integer targets (images, height, width) and logits (images, classes, height, width)."
        )
    counted = targets[_valid(targets, ignore_index)]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < outputs.shape[1]:
        raise UserError(
            f"The targets hold classes {int(counted.min())}..{int(counted.max())}, but the network has "
            f"{outputs.shape[1]}; give the class that does not count as ignore_index."
        )


def _valid(targets: Tensor, ignore_index: int | None) -> Tensor:
    return torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index


def _counts(classes: Tensor, n_classes: int) -> Tensor:
    """How often each class occurs in each image, (B, C) int64, of (B, S) int64 in 0..C; C itself is not counted."""
    counts = torch.zeros(len(classes), n_classes + 1, dtype=torch.int64, device=classes.device)
    return counts.scatter_add_(1, classes, torch.ones_like(classes))[:, :n_classes]
