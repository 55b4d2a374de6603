"""Metrics: how well one image's answer fits its target, from 0 (not at all) to 1 (perfectly).

Any callable (outputs, targets) -> (B,) is one; a network's score is the mean over images, and takes the place of
accuracy everywhere. `Top1` is the default. Each image is scored by itself: a score must not depend on its batch.

Shapes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError

Metric = Callable[[Tensor, Tensor], Tensor]
"""Outputs (B, ...) and targets (B, ...) -> one score per image, (B,), in [0, 1], higher is better."""


@dataclass(frozen=True)
class Top1:
    """1 where the largest logit is the label's, else 0: logits (B, C), labels int64 (B,)."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C), labels (B,) -> (B,) bool."""
        return outputs.argmax(1) == targets


@dataclass(frozen=True)
class TopK:
    """1 where the label is among the `k` largest logits, else 0: logits (B, C), labels int64 (B,)."""

    k: int = 5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"Top-k accuracy was given k={self.k}; expected 1 or more.")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C), labels (B,) -> (B,)."""
        best = outputs.topk(min(self.k, outputs.shape[1]), dim=1).indices
        return (best == targets[:, None]).any(1)


@dataclass(frozen=True)
class PixelAccuracy:
    """Fraction of an image's pixels whose largest logit is the target's class.

    Logits (B, C, ...), targets int64 (B, ...). Pixels whose target is `ignore_index` do not count, nor do they in the
    default loss; an image without any other pixel scores 1.
    """

    ignore_index: int | None = None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C, ...), targets (B, ...) -> (B,)."""
        _check_maps(outputs, targets, self.ignore_index)
        valid = _valid(targets, self.ignore_index).flatten(1)
        right = as_float64(((outputs.argmax(1) == targets).flatten(1) & valid).sum(1))
        n_valid = as_float64(valid.sum(1))
        return torch.where(n_valid > 0, right / n_valid.clamp_min(1), 1.0)


@dataclass(frozen=True)
class MeanIoU:
    """Intersection over union of predicted and target pixels of a class, averaged over classes, image by image.

    Logits (B, C, ...), targets int64 (B, ...). Classes that occur in neither do not count, nor do pixels whose target
    is `ignore_index` (nor in the default loss). An image without any other pixel scores 1. The mean over images is not
    the usual figure of a data set, which sums intersections and unions over images first and so has no score per image.
    """

    ignore_index: int | None = None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C, ...), targets (B, ...) -> (B,)."""
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
class Within:
    """Fraction of an image's numbers that miss their targets by `tolerance` at most, in the targets' unit.

    Outputs and floating targets of one shape, (B,) or (B, ...); with one number per image it is right or wrong.
    """

    tolerance: float

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
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

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise UserError(f"The metric Closeness was given scale={self.scale}; expected more than 0.")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Outputs (B, ...), targets (B, ...) -> (B,)."""
        return 1 / (1 + _errors(outputs, targets).mean(1) / self.scale)


def as_float64(values: Tensor) -> Tensor:
    """The values in float64, on the device they are on; on the CPU where that device has no float64 (mps)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Absolute errors (B, S), float64."""
    if outputs.shape != targets.shape:
        raise UserError(
            f"The network returns {tuple(outputs.shape)} for targets of shape {tuple(targets.shape)}; expected one "
            "number per target."
        )
    return (as_float64(outputs) - as_float64(targets)).abs().reshape(len(targets), -1)


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
