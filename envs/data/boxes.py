"""Boxes of detection targets: {'boxes', 'labels'} of an image as rows of a padded tensor, and back.

An image's target is (G, 5) float32: x1, y1, x2, y2 and the label of every box, with label -1 behind the last one. G is
the number of boxes of the image that has most, so that targets of all images have one shape.

Shapes: B images, n boxes of an image, G boxes with padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from .packing import as_tensor

BOX_KEYS, LABEL_KEYS = ("boxes", "bboxes"), ("labels", "class_labels")
NO_BOX = -1.0  # the label of rows that pad


def holds_boxes(target: Any) -> bool:
    """Whether a target is a mapping with boxes, as torchvision's and torchmetrics' detection take them."""
    return isinstance(target, Mapping) and any(key in target for key in BOX_KEYS)


def as_boxes(target: Mapping[str, Any]) -> Tensor:
    """Boxes and labels of one image, (n, 5) float32, of a mapping; further entries are left, and so are crowds.

    UserError for boxes that are not (n, 4) with x1 <= x2 and y1 <= y2, and for labels that are not one per box from 0.
    """
    keys = [next((key for key in known if key in target), None) for known in (BOX_KEYS, LABEL_KEYS)]
    if keys[1] is None:
        raise UserError(f"A detection target has the entries {', '.join(map(str, target))}; expected boxes and labels.")
    boxes, labels = (_plain(target[str(key)]) for key in keys)
    boxes = boxes.reshape(0, 4) if boxes.numel() == 0 else boxes
    if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.numel() != len(boxes):
        raise UserError(
            f"A detection target has boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)}; expected boxes "
            "(n, 4) and one label each."
        )
    rows = torch.cat([boxes, labels.reshape(-1, 1)], 1)
    check_boxes(rows)
    crowds = target.get("iscrowd")
    return rows if crowds is None else rows[_plain(crowds).reshape(-1) == 0]


def check_boxes(rows: Tensor) -> None:
    """UserError for boxes (n, 5) that are not corners, or whose labels are negative or not whole numbers."""
    corners, labels = rows[:, :4], rows[:, 4]
    odd = ((corners[:, 2:] < corners[:, :2]).any(1) | ~torch.isfinite(corners).all(1)).nonzero().flatten()
    if len(odd):
        found = [round(value, 4) for value in corners[odd[0]].tolist()]
        raise UserError(f"A detection target has the box {found}; expected corners: x1, y1, x2, y2.")
    if bool(((labels < 0) | (labels != labels.round())).any()):
        raise UserError(f"A detection target has labels from {float(labels.min()):g}; expected whole numbers from 0.")


def padded(rows: Tensor, count: int) -> Tensor:
    """Boxes (n, 5) with rows of label -1 up to `count`; UserError for more boxes than that."""
    if len(rows) > count:
        raise UserError(
            f"An image has {len(rows)} boxes, and when all were read the room was made for {count}; give targets that "
            "are padded already: (boxes, 5) with x1, y1, x2, y2, label and rows of label -1."
        )
    room = torch.zeros(count, 5)
    room[:, 4] = NO_BOX
    room[: len(rows)] = rows
    return room


def boxes_of(targets: Tensor) -> list[dict[str, Tensor]]:
    """Padded targets (B, G, 5) as {'boxes': (n, 4), 'labels': (n,) int64} per image: what detection losses often take.

    `keepdrop.boxes_of`, for a loss or a metric of your own, which gets targets padded.
    """
    chosen = (rows[rows[:, 4] >= 0] for rows in checked_targets(targets))
    return [{"boxes": rows[:, :4], "labels": rows[:, 4].long()} for rows in chosen]


def checked_targets(targets: Tensor) -> Tensor:
    """The targets; UserError unless they are (B, G, 5)."""
    if targets.dim() != 3 or targets.shape[2] != 5:
        raise UserError(
            f"Targets are {targets.dtype} {tuple(targets.shape)}; expected boxes: items (image, {{'boxes': (n, 4), "
            "'labels': (n,)}), or padded targets (images, boxes, 5) with x1, y1, x2, y2 and the label, -1 for no box."
        )
    return targets


def _plain(values: Any) -> Tensor:
    """A tensor of float32, without the subclass that transforms may have given it."""
    try:
        found = as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"A detection target holds {type(values).__name__}; expected tensors or arrays of boxes and labels."
        ) from error
    return found.detach().cpu().as_subclass(Tensor).to(torch.float32)
