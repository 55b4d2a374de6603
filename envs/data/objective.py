"""The objective of a network: a metric that scores its answers and a loss to train on, carried by the images.

Scores are kept as whole numbers of points, so that sums of them do not depend on batches, chunks or order: one point
for a right answer under `Top1`; under any other metric an image's score is rounded to a multiple of 2^-24, which is as
fine as float32 near 1, and counted in multiples of that.

Shapes: B images, C classes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import UserError, first_line
from .images import LabelledImages, batches_of
from .metrics import BinaryAccuracy, Metric, Top1, as_classes, as_float64, check_one_each, same_sides

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs (B, ...) and targets (B, ...) -> a scalar, the mean over the batch."""

GRID = 2**24
SEEN = 256  # targets that tell classes 0 and 1 from numbers
SLACK = 1e-6  # by which rounding may carry a score out of [0, 1]


@dataclass(frozen=True)
class Objective:
    """A metric and a loss.

    Args:
        metric: (outputs, targets) -> one score per image, (B,), in [0, 1], higher is better.
        loss: (outputs, targets) -> their mean loss. None: cross-entropy for classes, without the pixels that the
            metric ignores (its `ignore_index`), binary cross-entropy for one logit per target, the mean squared error
            for numbers.
        binary: whether floating targets are all 0 and 1, so that a metric of one's own has classes; None: not looked
            at yet (`suited`).

    Both get the network's output, of a dictionary its entry `out` (torchvision's segmentation networks). An output that
    differs from floating targets by sides of 1 only, such as (B, 1) and (B,), is given their shape.
    """

    metric: Metric = Top1()  # noqa: RUF009 - frozen
    loss: Loss | None = None
    binary: bool | None = None

    @property
    def is_top1(self) -> bool:
        """Whether scores are right or wrong by the largest logit, and targets labels."""
        return isinstance(self.metric, Top1)

    @property
    def is_of_set(self) -> bool:
        """Whether the metric scores a set of images (`ClassCounts`): points are answers then, which do not add up."""
        return bool(getattr(self.metric, "is_of_set", False))

    @property
    def needs_boxes(self) -> bool:
        """Whether targets are boxes, which belong to places of the image (`MeanAveragePrecision`)."""
        return bool(getattr(self.metric, "needs_boxes", False))

    @property
    def name(self) -> str:
        """The metric's name for display, with the arguments that differ from the defaults."""
        return _name(self.metric)

    @property
    def unit(self) -> int:
        """Points of a perfect answer, where points add up (`is_of_set`)."""
        return 1 if self.is_top1 else GRID

    @property
    def dtype(self) -> torch.dtype:
        """Type of an image's points."""
        return torch.bool if self.is_top1 else torch.int32

    def points_shape(self, targets: Tensor) -> tuple[int, ...]:
        """Shape of one image's points for such targets (B, ...): () but for a metric of sets with an `answer_shape`."""
        return self.metric.answer_shape(targets) if hasattr(self.metric, "answer_shape") else ()

    def room(self, n_masks: int, targets: Tensor) -> Tensor:
        """Room for the points of images with such targets (B, ...) under M masks, (M, B) or more, on the CPU."""
        return torch.empty(n_masks, len(targets), *self.points_shape(targets), dtype=self.dtype)

    def points(self, outputs: Any, targets: Tensor) -> Tensor:
        """Each image's score in points, (B,) bool for `Top1`, else int32; UserError for what is not a score.

        Points of a metric of sets are its answers, (B,) or (B, W); the first number of each is not negative.
        """
        if self.is_top1 or self.is_of_set:
            return self.metric(output_of(outputs), targets)
        scores = self.metric(self._fitted(output_of(outputs).float(), targets), targets)
        points = (self._checked(scores, len(targets)).clamp(0, 1) * GRID).round().to(torch.int32)
        return points.to(targets.device)

    def fraction(self, points: Tensor) -> float:
        """Mean score of the images with these points (B,), or the score of their set, (B,) or (B, W)."""
        if self.is_of_set:
            return float(self.metric.of_set(points))  # type: ignore[attr-defined]
        return int(points.sum()) / (self.unit * len(points))

    def mean_loss(self, outputs: Any, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The loss, averaged over the batch."""
        outputs = self._fitted(output_of(outputs), targets)
        if self.loss is None and self.needs_boxes:
            raise UserError(
                "Detection has no loss that fits every network; give the one that yours was trained with:",
                python="Settings(loss=FUNCTION), a function of outputs and targets.",
                typed="loss=custom loss._target_=mine.name.",
            )
        if self.loss is not None:
            return self.loss(outputs, targets.to(outputs.dtype) if targets.is_floating_point() else targets)
        if self._has_numbers(targets):
            check_one_each(outputs, targets)
            return functional.mse_loss(outputs, targets.to(outputs.dtype))
        outputs, targets = self._as_classes(outputs, targets)
        return functional.cross_entropy(outputs, targets, ignore_index=self._ignored, label_smoothing=smoothing)

    def summed_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """The loss summed over images, so that an image's share does not depend on how many there are."""
        outputs = output_of(outputs)
        if self.loss is None and targets.dim() == 1 and not self._has_numbers(targets):
            outputs, targets = self._as_classes(outputs, targets)
            return functional.cross_entropy(outputs, targets, reduction="sum")
        return self.mean_loss(outputs, targets) * len(targets)

    def distilled(
        self, loss: Tensor, outputs: Any, dense: Any, targets: Tensor, weight: float, temperature: float
    ) -> Tensor:
        """(1 - weight) * loss + weight * the distance from a teacher's outputs, averaged over the batch.

        For classes it is temperature^2 * KL(teacher || network) over them, averaged over images and pixels (Hinton et
        al. 2015, arXiv 1503.02531, section 2), with one logit per target over yes and no; for numbers, and for outputs
        that are not logits of the targets' classes (CTC), the mean squared difference of the outputs. A loss with a
        method `distance(outputs, dense_outputs)` brings its own.
        """
        ours, theirs = output_of(outputs).float(), output_of(dense).float()
        if (own := getattr(self.loss, "distance", None)) is not None:
            return (1 - weight) * loss + weight * own(ours, theirs)
        if self._has_numbers(targets):
            return (1 - weight) * loss + weight * functional.mse_loss(ours, theirs)
        try:
            (ours, classes), (theirs, _) = (self._as_classes(each, targets) for each in (ours, theirs))
        except UserError:  # one number per target, and targets are no classes: the loss knows what they are
            classes = targets
        if ours.dim() < 2 or ours.shape[:1] + ours.shape[2:] != classes.shape:
            return (1 - weight) * loss + weight * functional.mse_loss(ours, theirs)
        ours, theirs = (functional.log_softmax(values / temperature, dim=1) for values in (ours, theirs))
        divergence = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) / classes[0].numel()
        return (1 - weight) * loss + weight * temperature**2 * divergence

    def check_smoothing(self, smoothing: float, targets: Tensor) -> None:
        """UserError for label smoothing with a loss that has none."""
        if smoothing > 0 and (self.loss is not None or self._has_numbers(targets)):
            raise UserError(
                f"label_smoothing is {smoothing:g}, which goes with cross-entropy only; set it to 0, or put it into "
                "your own loss."
            )

    def try_out(self, outputs: Any, targets: Tensor) -> None:
        """UserError where the metric or the loss cannot work with such outputs and targets."""
        shapes = f"outputs {_shown(self._fitted(output_of(outputs), targets))} and targets {_shown(targets)}"
        loss = "loss" if self.loss is None else f"loss {_name(self.loss)}"
        points = _tried(lambda: self.points(outputs, targets), f"metric {self.name}", shapes)
        if self.is_of_set:
            self._check_answers(points, targets)
        value = _tried(lambda: self.mean_loss(outputs, targets), loss, shapes)
        if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value).all()):
            raise UserError(
                f"The {loss} returns {_shown(value)} for {shapes}; expected one finite number, the mean over the batch."
            )

    @property
    def identity(self) -> str:
        """What distinguishes this objective from others in the digest of a training; "" for the default."""
        return "" if self == TOP1 else f" {self.name} {_name(self.loss)}" + " binary" * bool(self.binary)

    def suited(self, targets: Tensor) -> Objective:
        """The objective for such targets: floating ones that are all 0 and 1 are classes, not numbers.

        Where they are one per image, top-1 accuracy becomes `BinaryAccuracy`.
        """
        if self.binary is not None or not targets.is_floating_point() or getattr(self.metric, "needs_numbers", False):
            return self
        binary = bool(((targets == 0) | (targets == 1)).all())
        single = self.is_top1 and targets[0].numel() == 1
        return dataclasses.replace(self, metric=BinaryAccuracy() if single and binary else self.metric, binary=binary)

    def _has_numbers(self, targets: Tensor) -> bool:
        """Whether targets are numbers to be met; a metric for classes or for numbers says so, else their type does."""
        if hasattr(self.metric, "needs_classes"):
            return False
        floating = targets.is_floating_point() and not self.binary
        return floating or hasattr(self.metric, "needs_numbers")

    def _fitted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Outputs in the shape of numbers where the two differ by sides of 1 only: (B, 1) against (B,)."""
        numbers = targets.is_floating_point() or self._has_numbers(targets)
        differ = numbers and outputs.shape != targets.shape
        return outputs.reshape(targets.shape) if differ and same_sides(outputs, targets) else outputs

    def answers_yes_or_no(self, outputs: Any, targets: Tensor) -> bool:
        """Whether one logit stands for each target, which is 0 or 1, in a metric that looks at classes."""
        given = output_of(outputs)
        return hasattr(self.metric, "needs_classes") and given.dim() > 0 and same_sides(given, targets)

    def _as_classes(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return as_classes(outputs, targets, getattr(self.metric, "probabilities", False), self._ignored)

    @property
    def _ignored(self) -> int:
        found = getattr(self.metric, "ignore_index", None)
        return -100 if found is None else int(found)  # torch's own default

    def _check_answers(self, answers: Any, targets: Tensor) -> None:
        """UserError for what a metric of sets may not answer for images: see `points`."""
        expected = (len(targets), *self.points_shape(targets))
        whole = isinstance(answers, Tensor) and not answers.is_floating_point() and not answers.is_complex()
        if not whole or answers.shape != expected or int(answers.reshape(len(targets), -1)[:, 0].min()) < 0:
            raise UserError(
                f"The metric {self.name} of a set answers {_shown(answers)} for {len(targets)} images; expected "
                f"integers {expected}, the first of each image 0 or above."
            )

    def _checked(self, scores: Any, n_images: int) -> Tensor:
        if not isinstance(scores, Tensor) or scores.shape != (n_images,):
            raise UserError(
                f"The metric {self.name} returns {_shown(scores)} for {n_images} images; expected a tensor of shape "
                f"({n_images},), one score per image."
            )
        scores = as_float64(scores)
        if not bool(((scores >= -SLACK) & (scores <= 1 + SLACK)).all()):
            raise UserError(
                f"The metric {self.name} returns scores from {float(scores.min()):g} to {float(scores.max()):g}; "
                "expected fractions from 0 to 1, higher is better."
            )
        return scores


TOP1 = Objective()


def display_name(name: str | None, *, opens: bool = False) -> str:
    """A metric's name for display: "accuracy" for top-1 and for runs of earlier versions, which name none.

    `opens` capitalises it, to begin a sentence or a title.
    """
    said = "accuracy" if name in (None, TOP1.name) else name
    return said[0].upper() + said[1:] if opens else said


class ImagesWithObjective:
    """Images with an objective of their own; everything else is that of the images (`LabelledImages`)."""

    def __init__(self, images: LabelledImages, objective: Objective) -> None:
        self.images, self.objective = images, objective

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of every image; (channels, length) of signals and so on."""
        return self.images.image_shape

    @property
    def n_classes(self) -> int:
        """Labels lie in [0, n_classes); 0 for targets of another kind."""
        return self.images.n_classes

    @property
    def labels(self) -> Tensor:
        """All targets."""
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Indices int64 (B,) -> images float32 (B, C, H, W), normalised, and targets (B, ...)."""
        return self.images.batch(indices)

    def batches(self, parts: Sequence[Tensor], pinned: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch of each of `parts`, read ahead where the images can be (`batches_of`)."""
        return batches_of(self.images, parts, pinned)

    def select(self, indices: Tensor) -> ImagesWithObjective:
        """Only the images at `indices` int64, in that order."""
        return ImagesWithObjective(self.images.select(indices), self.objective)

    def digest(self) -> str:
        """sha256 of the images and targets."""
        return self.images.digest()


def without_objective(images: LabelledImages) -> LabelledImages:
    """The images themselves, which may go with the usual one."""
    return images.images if isinstance(images, ImagesWithObjective) else images


def with_objective(images: LabelledImages, objective: Objective) -> LabelledImages:
    """The images with `objective` for their answers. UserError for `Top1` where the targets are not labels."""
    if images.n_classes < 1:
        objective = objective.suited(images.batch(torch.arange(min(SEEN, len(images))))[1])
    if objective.is_top1 and images.n_classes < 1:
        targets = images.batch(torch.arange(min(SEEN, len(images))))[1]
        raise UserError(
            f"A target is {_shown(targets[0])}, but top-1 accuracy needs one integer label per image"
            f"{_as_labels_would_be(targets)}; choose another metric, e.g.",
            python="MeanIoU for class maps, BinaryAccuracy for several yes-or-no labels, MeanAveragePrecision for "
            "boxes, Within for numbers, as in Settings(metric=keepdrop.Within(0.1)).",
            typed="metric=mean_iou for class maps, metric=binary for yes-or-no labels, metric=mean_average_precision "
            "for boxes, metric=within for numbers.",
        )
    bare = without_objective(images)
    return bare if objective == TOP1 else ImagesWithObjective(bare, objective)


def _as_labels_would_be(targets: Tensor) -> str:
    """How targets that are labels in another form become integers; "" for others."""
    if targets.dim() == 2 and bool(((targets == 0) | (targets == 1)).all() and (targets.sum(1) == 1).all()):
        return " (these look one-hot: targets.argmax(1) are their labels)"
    if targets[0].numel() == 1 and targets.is_floating_point() and bool((targets == targets.round()).all()):
        return " (these are whole numbers: targets.long() are labels)"
    return ""


def objective_of(images: LabelledImages) -> Objective:
    """The objective for answers to these images: top-1 accuracy and cross-entropy unless stated otherwise."""
    return getattr(images, "objective", TOP1)


def output_of(value: Any) -> Tensor:
    """The network's output: a tensor as it is, of a dictionary its entry `out`; UserError for anything else."""
    found = value.get("out") if isinstance(value, Mapping) else value
    if not isinstance(found, Tensor):
        raise UserError(
            f"The network returns {_shown(value)}; expected a tensor, or a dictionary with a tensor under 'out'."
        )
    return found


def _tried(call: Callable[[], Any], what: str, shapes: str) -> Any:
    """What `call` returns; a UserError for what it raises, or where torch warns that a loss repeats its targets."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Using a target size")
            return call()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The {what} fails on {shapes} ({type(error).__name__}: {first_line(error).partition('. ')[0]}); expected "
            "one that takes them."
        ) from error


def _name(function: Any) -> str:
    if dataclasses.is_dataclass(function) and not isinstance(function, type):
        given = {each.name: getattr(function, each.name) for each in fields(function)}
        shown = {name: _name(value) if callable(value) else value for name, value in given.items()}
        chosen = [f"{each.name}={shown[each.name]}" for each in fields(function) if given[each.name] != each.default]
        return type(function).__name__ + (f"({', '.join(chosen)})" if chosen else "")
    function = getattr(function, "func", function)  # of a partial
    return str(getattr(function, "__name__", type(function).__name__))


def _shown(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
