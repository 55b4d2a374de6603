"""Mean average precision (mAP) of detections, as COCO defines it: a metric of a whole set of images.

Lin et al. 2014, "Microsoft COCO" (arXiv 1405.0312), as evaluated by pycocotools: detections are matched in the order of
their scores, each with the free object of its class that it overlaps most; precision is made monotone, read at 101
recalls, and averaged over them, over thresholds of overlap and over classes that occur.

Written here and not taken from torchmetrics, whose figure a test holds it equal to: that library asks for torchvision,
which does not load beside every build of torch, and takes 0.1 s for 300 images, of which a search scores thousands.

Deviations: `max_detections` holds for an image, not for each of its classes; crowds do not occur (`boxes`).

Shapes: B images, D detections of an image, G boxes of its target, T thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .boxes import checked_targets

RECALLS = np.linspace(0, 1, 101)
THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
MOST_DETECTIONS = 10_000
EMPTY = -2  # in a row of answers: no detection, no object
Decode = Callable[[Any], Any]
"""A network's outputs -> per image a mapping of boxes (D, 4), scores (D,) and labels (D,), or a tensor (B, D, 6)."""


@dataclass(frozen=True)
class MeanAveragePrecision:
    """Mean average precision of the detections in a set of images, averaged over classes and thresholds of overlap.

    Targets are boxes (`boxes`). The loss has to be given.

    Args:
        decode: outputs -> detections, after suppression of doubles: for each image {'boxes': (D, 4) as x1, y1, x2, y2,
            'scores': (D,), 'labels': (D,)}, as torchvision and torchmetrics have them, or one tensor (B, D, 6) of
            x1, y1, x2, y2, score, label, in which a score of 0 or less is no detection. None: outputs are such.
        iou: intersection over union from which on a box is found; None: the mean over 0.5, 0.55, ..., 0.95.
        max_detections: those of an image that count, by score.
    """

    decode: Decode | None = None
    iou: float | None = None
    max_detections: int = 100
    is_of_set: ClassVar[bool] = True
    needs_boxes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.decode is not None and not callable(self.decode):
            raise UserError(
                f"MeanAveragePrecision was given decode={self.decode!r}; expected a function of the network's outputs."
            )
        if self.iou is not None and not 0 < self.iou <= 1:
            raise UserError(f"MeanAveragePrecision was given iou={self.iou}; expected a fraction, or None: the mean.")
        if not 1 <= self.max_detections <= MOST_DETECTIONS:
            raise UserError(
                f"MeanAveragePrecision was given max_detections={self.max_detections}; expected 1 to {MOST_DETECTIONS}."
            )

    @property
    def thresholds(self) -> tuple[float, ...]:
        """T thresholds of overlap."""
        return THRESHOLDS if self.iou is None else (self.iou,)

    def answer_shape(self, targets: Tensor) -> tuple[int, ...]:
        """Of one image's answer, for targets (B, G, 5): three numbers per detection, then one per box, behind a 0."""
        return (1 + 3 * self.max_detections + checked_targets(targets).shape[1],)

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        """Outputs that `decode` takes, and targets (B, G, 5) -> answers (B, W) int32.

        An answer is 0; score (the bits of a float32), label and found thresholds (bits) of every detection, best first;
        the labels of the image's boxes. What is left of each is filled up.
        """
        targets = checked_targets(targets).cpu()
        found = self._detections(outputs, len(targets))
        hits = matched(found, targets, self.thresholds)
        answers = torch.full((len(targets), *self.answer_shape(targets)), EMPTY, dtype=torch.int32)
        answers[:, 0] = 0
        scores, labels = found[..., 4].float(), found[..., 5]
        there = scores > 0
        count, room = found.shape[1], self.max_detections
        for column, values in enumerate((scores.contiguous().view(torch.int32), labels.int(), hits)):
            first = 1 + column * room
            answers[:, first : first + count] = torch.where(there, values, EMPTY)
        answers[:, 1 + 3 * room :] = torch.where(targets[..., 4] >= 0, targets[..., 4].int(), EMPTY)
        return answers

    def of_set(self, answers: Tensor) -> float:
        """The mean average precision of the images with these answers (B, W); without objects 1 if none is found."""
        rows, room = answers.cpu(), self.max_detections
        scores, labels, hits = (rows[:, 1 + k * room : 1 + (k + 1) * room].flatten() for k in range(3))
        there = scores != EMPTY
        found = scores[there].view(torch.float32).numpy(), labels[there].numpy(), hits[there].numpy()
        truth = rows[:, 1 + 3 * room :]
        classes, counts = torch.unique(truth[truth != EMPTY], return_counts=True)
        if not len(classes):
            return float(not bool(there.any()))
        each = zip(classes.tolist(), counts.tolist(), strict=True)
        return float(np.mean([_average_precision(*found, label, n, len(self.thresholds)) for label, n in each]))

    def _detections(self, outputs: Any, n_images: int) -> Tensor:
        """Detections (B, D, 6) float64 on the CPU, by score, at most `max_detections`; a score of 0 or less is none."""
        decoded = outputs if self.decode is None else self.decode(outputs)
        if isinstance(decoded, Sequence):
            decoded = _stacked(decoded)
        if not isinstance(decoded, Tensor) or decoded.dim() != 3 or decoded.shape[::2] != (n_images, 6):
            shown = tuple(decoded.shape) if isinstance(decoded, Tensor) else type(decoded).__name__
            raise UserError(
                f"MeanAveragePrecision was given detections {shown} for {n_images} images"
                + (" by decode; expected " if self.decode else "; expected `decode`, a function of yours that gives ")
                + "for each image boxes (D, 4), scores (D,) and labels (D,), or a tensor (images, D, 6)."
            )
        found = decoded.detach().cpu().double()
        order = found[..., 4].sort(dim=1, descending=True, stable=True).indices[:, : self.max_detections]
        found = found.gather(1, order[..., None].expand(-1, -1, 6))
        return found[:, : int((found[..., 4] > 0).sum(1).max())] if found.numel() else found


def matched(found: Tensor, targets: Tensor, thresholds: Sequence[float]) -> Tensor:
    """At which thresholds each detection finds a box, as bits: (B, D) int32 of detections (B, D, 6), by score.

    Greedy, as in COCO: the best detection first, each takes the free box of its class that it overlaps most.
    """
    overlaps = box_iou(found[..., :4], targets[..., :4].double())
    alike = (found[..., 5, None] == targets[:, None, :, 4].double()) & (targets[:, None, :, 4] >= 0)
    overlaps = torch.where(alike & (found[..., 4, None] > 0), overlaps, -1.0)
    least = torch.tensor(thresholds, dtype=torch.float64).clamp_max(1 - 1e-10)
    free = torch.ones(len(found), len(thresholds), targets.shape[1], dtype=torch.bool)
    hits = torch.zeros(found.shape[:2], dtype=torch.int32)
    if not targets.shape[1]:
        return hits
    bits = 2 ** torch.arange(len(thresholds), dtype=torch.int32)
    for rank in range(found.shape[1]):
        # The last of equal overlaps, as there: `max` gives any of them.
        best, box = torch.where(free, overlaps[:, rank, None], -1.0).flip(2).max(2)
        box = targets.shape[1] - 1 - box
        hit = best >= least
        free.scatter_(2, box[..., None], free.gather(2, box[..., None]) & ~hit[..., None])
        hits[:, rank] = (hit * bits).sum(1)
    return hits


def box_iou(ours: Tensor, theirs: Tensor) -> Tensor:
    """Intersection over union (..., D, G) of boxes (..., D, 4) and (..., G, 4), x1, y1, x2, y2; 0 for empty ones."""
    one, other = ours[..., :, None, :], theirs[..., None, :, :]
    sides = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp_min(0)
    both = sides.prod(-1)
    either = (one[..., 2:] - one[..., :2]).prod(-1) + (other[..., 2:] - other[..., :2]).prod(-1) - both
    return torch.where(either > 0, both / either.clamp_min(1e-30), 0.0)


def _average_precision(
    scores: np.ndarray, labels: np.ndarray, hits: np.ndarray, label: int, n_boxes: int, n_thresholds: int
) -> float:
    """Average precision of one class over all thresholds, of all detections' scores, labels and hits, (n,) each."""
    own = labels == label
    order = np.argsort(-scores[own], kind="stable")
    found = (hits[own][order, None] >> np.arange(n_thresholds) & 1).T  # (T, n)
    if found.shape[1] == 0:
        return 0.0
    right = found.cumsum(1)
    precision = right / np.arange(1, found.shape[1] + 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    places = np.stack([np.searchsorted(each, RECALLS) for each in right / n_boxes])
    read = np.take_along_axis(precision, places.clip(max=found.shape[1] - 1), axis=1)
    return float(np.where(places < found.shape[1], read, 0.0).mean())


def _stacked(decoded: Sequence[Any]) -> Tensor:
    """Detections per image as one tensor (B, D, 6), filled up with scores of -1."""
    rows = []
    for each in decoded:
        if not isinstance(each, Mapping) or not {"boxes", "scores", "labels"} <= set(each):
            shown = ", ".join(map(str, each)) if isinstance(each, Mapping) else type(each).__name__
            raise UserError(f"decode gave {shown} for an image; expected a mapping of boxes, scores and labels.")
        parts = [torch.as_tensor(each[name]).detach().cpu().double() for name in ("boxes", "scores", "labels")]
        if parts[0].reshape(-1, 4).shape[0] != parts[1].numel() or parts[1].numel() != parts[2].numel():
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise UserError(f"decode gave boxes, scores and labels of shapes {shapes}; expected (D, 4), (D,) and (D,).")
        rows.append(torch.cat([parts[0].reshape(-1, 4), *(part.reshape(-1, 1) for part in parts[1:])], 1))
    room = torch.zeros(len(rows), max((len(each) for each in rows), default=0), 6, dtype=torch.float64)
    room[..., 4] = -1
    for place, each in zip(room, rows, strict=True):
        place[: len(each)] = each
    return room
