"""Images as a caller from Python has them: datasets, pairs of tensors, or keepdrop's own sources."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...envs.data.images import ArrayImages, DatasetImages, LabelledData, LabelledImages
from ...envs.data.objective import TOP1, ImagesWithObjective, Objective, with_objective
from ...envs.data.splits import Source, Splits, split
from ...errors import UserError

MOST_REWARD_IMAGES = 2000


def labelled_data(train: Any, test: Any) -> LabelledData:
    """Training and test images behind one interface; UserError for what cannot be read."""
    ours = labelled_images(train, "train")
    return LabelledData(ours, labelled_images(test, "test", ours.n_classes))


def labelled_images(source: Any, name: str, n_classes: int | None = None) -> LabelledImages:
    """A pair of tensors, a map-style dataset, or a `LabelledImages` as it is; `n_classes` None: as many as labels."""
    if isinstance(source, tuple | list) and len(source) == 2 and all(isinstance(part, Tensor) for part in source):
        return _from_tensors(source[0], source[1], name, n_classes)
    if all(hasattr(source, wanted) for wanted in ("batch", "select", "digest")):
        return source
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return DatasetImages(source, n_classes)
    raise UserError(
        f"{name} is a {type(source).__name__}; expected a map-style dataset of (image tensor, integer label) or a pair "
        "of tensors (images, labels): of a DataLoader give its dataset."
    )


def _from_tensors(images: Tensor, labels: Tensor, name: str, n_classes: int | None) -> ArrayImages:
    """Images as the network takes them, floating (n, C, H, W), and labels (n,), or other targets (n, ...)."""
    if images.dim() != 4 or not images.is_floating_point() or labels.shape[:1] != images.shape[:1] or not len(images):
        raise UserError(
            f"{name} is images {images.dtype} {tuple(images.shape)} and labels {tuple(labels.shape)}; expected "
            "floating images (n, channels, height, width), normalised as the network takes them, and labels (n,)."
        )
    for what, values in (("images", images), ("targets", labels)):
        if not bool(torch.isfinite(values).all()):
            raise UserError(f"The {what} of {name} hold NaN or infinite values; mend or remove them.")
    channels = images.shape[1]
    n_classes = _count_classes(labels, name, n_classes)
    return ArrayImages(images.detach().cpu().float(), labels.cpu(), [0.0] * channels, [1.0] * channels, n_classes)


def _count_classes(labels: Tensor, name: str, n_classes: int | None) -> int:
    """How many classes labels (n,) have, at least `n_classes`; 0 for targets that are no labels."""
    if n_classes == 0 or labels.dim() != 1 or labels.is_floating_point():
        return 0
    if int(labels.min()) < 0:
        raise UserError(f"The labels of {name} are {labels.dtype} from {labels.min()}; expected integers from 0.")
    n_classes = n_classes or int(labels.max()) + 1
    if int(labels.max()) >= n_classes:
        raise UserError(f"The labels of {name} must lie in 0..{n_classes - 1}, got {int(labels.max())}.")
    return n_classes


def three_splits(
    data: LabelledData, reward_from: Source, reward_size: int | None, seed: int, objective: Objective = TOP1
) -> Splits:
    """Fit, reward and report; the reward images are read once and stay in memory.

    `reward_size` None takes a fifth of the source, at most 2,000 images. `objective` goes with all three.
    """
    if reward_size is None and reward_from in ("train", "test"):
        reward_size = min(MOST_REWARD_IMAGES, max(1, len(getattr(data, reward_from)) // 5))
    splits = split(data, reward_from=reward_from, reward_size=reward_size or 0, seed=seed, objective=objective)
    bare = splits.reward.images if isinstance(splits.reward, ImagesWithObjective) else splits.reward
    if isinstance(bare, ArrayImages):
        return splits
    images, labels = bare.batch(torch.arange(len(bare)))
    in_memory = _from_tensors(images, labels, "reward", bare.n_classes)
    return dataclasses.replace(splits, reward=with_objective(in_memory, objective))
