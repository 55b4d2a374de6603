"""Items of a user's dataset or DataLoader, one by one: image and target out of tuples, mappings, arrays and numbers.

Mistakes in them, a damaged file or a label that is a name, are a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from ...errors import UserError, summarised
from .boxes import holds_boxes
from .packing import as_tensor, is_several

IMAGE_KEYS = ("image", "images", "img", "pixel_values", "x", "input", "inputs", "data")
TARGET_KEYS = ("label", "labels", "target", "targets", "y", "class", "mask")
ARRAYS = (Tensor, np.ndarray)


class CollatedItems:
    """The items of a dataset as a DataLoader's own `collate_fn` makes them of one item at a time."""

    def __init__(self, dataset: Any, collate: Any) -> None:
        self._dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        images, targets = pair_of(self._collate([read_item(self._dataset, index)]))
        if isinstance(images, Mapping):
            return {name: value[0] for name, value in images.items()}, targets[0]
        listed = isinstance(images, tuple | list) and len(images) > 1  # a list of one: that of images
        several = listed and is_several(images) and len(images[0]) == 1
        return tuple(value[0] for value in images) if several else images[0], targets[0]


def loaded(loader: DataLoader[Any], name: str) -> Any:
    """What a DataLoader loads, as a map-style dataset: its dataset, of it the subset that a sampler names."""
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"{name} is a DataLoader of an iterable dataset, whose images have no numbers; give a map-style dataset, "
            "or a pair (images, labels) of tensors."
        )
    if loader.collate_fn not in (default_collate, None):
        dataset = CollatedItems(dataset, loader.collate_fn)
    sampler = loader.sampler
    chosen = sampler if isinstance(sampler, list | tuple | range) else getattr(sampler, "indices", None)
    if chosen is None:
        return dataset
    return Subset(dataset, list(dict.fromkeys(int(index) for index in chosen)))


def read_item(dataset: Any, index: int) -> Any:
    """One item of the user's dataset, whose own mistakes (a damaged image) are a sentence."""
    try:
        return dataset[index]
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"Item {index} of a dataset cannot be read ({summarised(error)}); repair it, or leave it out."
        ) from error


def pair_of(item: Any) -> tuple[Any, Any]:
    """Image and target of a dataset's item: of a mapping by their names, else the first two; more may follow labels."""
    if isinstance(item, Mapping):
        keys = [next((key for key in known if key in item), None) for known in (IMAGE_KEYS, TARGET_KEYS)]
        if keys[0] is not None and holds_boxes(item):
            return item[keys[0]], item
        if None in keys:
            raise UserError(
                f"A dataset's item is a mapping of {', '.join(map(str, item))}; expected an image under one of "
                f"{', '.join(IMAGE_KEYS)} and a target under one of {', '.join(TARGET_KEYS)}."
            )
        return item[keys[0]], item[keys[1]]
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise UserError(f"A dataset must give (image tensor, label), got {shown(item)}.")
    second = item[1] if isinstance(item[1], ARRAYS) else None
    if len(item) > 2 and second is not None and math.prod(second.shape) > 1 and target_of(second).is_floating_point():
        raise UserError(
            f"A dataset's item is {shown(item)}, of which the second could be an input or a target; give (image, "
            "target), or ((image, second input), target)."
        )
    return item[0], item[1]


def evenly(count: int, most: int) -> list[int]:
    """At most `most` positions of `count`, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def image_of(value: Any) -> Tensor:
    """An image, floating (C, ...), as a tensor; UserError for anything else."""
    if not isinstance(value, ARRAYS):
        hint = "give one tensor" if isinstance(value, tuple | list | Mapping) else "add a transform that makes one"
        raise UserError(f"A dataset must give (image tensor, label), got as an image {shown(value)}; {hint}.")
    image = target_of(value)
    if image.ndim < 2 or not image.is_floating_point():
        raise UserError(
            "Dataset images must be floating tensors (channels, height, width), "
            f"got {image.dtype} of shape {tuple(image.shape)}; convert them in the dataset's transform."
        )
    return image


def target_of(value: Any) -> Tensor:
    """A target as a tensor, (...) or () of a label; UserError for what makes none, such as a name."""
    try:
        return as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"A dataset must give an integer label, or a target that is a number, an array or a tensor; got "
            f"{type(value).__name__}: convert it in the dataset."
        ) from error


def label_of(value: Any) -> int:
    """One integer of a label, be it a number, a tensor or an array of one element."""
    label = target_of(value)
    if label.numel() != 1:
        raise UserError(
            f"Dataset targets differ in shape: {shown(value)} came after a single integer label; give all of them one "
            "shape."
        )
    return int(label.reshape(()))


def listed_labels(dataset: Any) -> Tensor | None:
    """The labels that a dataset lists, where they are integers, one per item; they may be anything."""
    if isinstance(dataset, Subset):
        whole = listed_labels(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, TensorDataset):
        listed: Any = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    else:
        listed = getattr(dataset, "targets", None)
    try:
        labels = torch.as_tensor(listed)
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.is_floating_point() or labels.dim() == 0 or labels.shape[1:].numel() != 1:
        return None
    return labels.reshape(-1).long()


def shown(value: Any) -> str:
    """What an item is, in a few words of an error."""
    if isinstance(value, ARRAYS):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(map(shown, value[:4])) or 'nothing'}"
    return f"{type(value).__name__}" + (f" (mode {value.mode})" if hasattr(value, "getbands") else "")
