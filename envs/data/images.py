"""Images and their targets behind one small interface: arrays held in memory, or any map-style dataset.

Targets are labels, one integer per image, or, for another metric than top-1, tensors of one shape: class maps, numbers.

Shape suffixes: B images of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ...errors import UserError


class LabelledImages(Protocol):
    """What training, criteria and rewards read: normalised float images and their targets, by index."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""

    @property
    def n_classes(self) -> int:
        """Labels lie in [0, n_classes); 0 where targets are not labels."""

    @property
    def labels(self) -> Tensor:
        """All labels, int64 (len,), or targets (len, ...)."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Indices int64 (B,) -> images float32 (B, C, H, W), normalised, and labels int64 (B,).

        Other targets are (B, ...), int64 or float32.
        """

    def select(self, indices: Tensor) -> LabelledImages:
        """Only the images at `indices` int64, in that order."""

    def digest(self) -> str:
        """sha256 hex digits that identify the labels, and the pixels where they are in memory."""


@dataclass(frozen=True)
class LabelledData:
    """The training and the test images of one source. Raises UserError where the two do not fit together."""

    train: LabelledImages
    test: LabelledImages

    def __post_init__(self) -> None:
        for name, images in (("train", self.train), ("test", self.test)):
            if len(images) == 0:
                raise UserError(f"The {name} images are empty; give at least one image.")
        counts = {"train": self.train.n_classes, "test": self.test.n_classes}
        if min(counts.values()) == 0 < max(counts.values()):
            name, other = sorted(counts, key=lambda each: counts[each])
            raise UserError(
                f"The targets of {name} are not class labels, those of {other} are; expected integers from 0 in both, "
                "or targets of one kind and a metric for them."
            )
        for what in ("image_shape", "n_classes", "target_shape"):
            ours, theirs = getattr(self.train, what, None), getattr(self.test, what, None)
            if ours != theirs:
                raise UserError(f"Train and test images differ in {what}: {ours} against {theirs}; make them equal.")


class ArrayImages:
    """Images in memory, kept in their own type (uint8 takes a quarter of float32) and normalised batch by batch.

    `images`: uint8 or floating, (len, C, H, W); `labels`: int64 (len,), or with `n_classes` 0 any targets (len, ...),
    kept in their own type, of which a batch is int64 or float32. A batch of images is (images * scale - mean) / std
    with `mean` and `std` one number per channel. `scale` defaults to 1/255 for uint8 and to 1 for floating images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        n_classes: int,
        scale: float | None = None,
    ) -> None:
        channels = images.shape[1]
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise UserError(
                f"Normalisation needs one mean and one positive std for each of the {channels} channels, "
                f"got mean={list(mean)} and std={list(std)}."
            )
        if len(images) != len(labels):
            raise UserError(f"There are {len(images)} images but {len(labels)} labels; give one label per image.")
        self._images, self.n_classes = images, n_classes
        self.labels = labels.long() if n_classes else labels
        self.target_shape = tuple(labels.shape[1:])
        self._scale = scale if scale is not None else (1.0 if images.is_floating_point() else 1 / 255)
        self._mean, self._std = tuple(mean), tuple(std)
        self._factor = (self._scale / torch.tensor(std, dtype=torch.float32)).view(1, -1, 1, 1)
        self._shift = (torch.tensor(mean, dtype=torch.float32) / torch.tensor(std)).view(1, -1, 1, 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Indices int64 (B,) -> images float32 (B, C, H, W), normalised, and labels int64 (B,) or targets (B, ...)."""
        images = self._images[indices].to(torch.float32)
        return images.mul_(self._factor).sub_(self._shift), as_targets(self.labels[indices])

    def select(self, indices: Tensor) -> ArrayImages:
        """Only the images at `indices` int64, in that order (a copy)."""
        return ArrayImages(
            self._images[indices], self.labels[indices], self._mean, self._std, self.n_classes, self._scale
        )

    def digest(self) -> str:
        """sha256 over labels, pixels and normalisation."""
        digest = hashlib.sha256(f"{self.image_shape} {self._mean} {self._std} {self._scale}".encode())
        digest.update(self.labels.contiguous().numpy().tobytes())
        # NHWC is how most arrays arrive, so this is a view and not a copy.
        digest.update(self._images.permute(0, 2, 3, 1).contiguous().numpy().data)
        return digest.hexdigest()


class DatasetImages:
    """Any map-style dataset of (image tensor (C, H, W), integer label), e.g. a `torch.utils.data.Dataset`.

    `n_classes` is read from `dataset.classes` or from the labels when not given; labels come from `dataset.targets`
    where it exists, else every item is read once. Where the first item's target is not a single integer, or `n_classes`
    is 0, targets are numbers or arrays of one shape. Raises UserError for items of another form.
    """

    def __init__(self, dataset: Any, n_classes: int | None = None, indices: Tensor | None = None) -> None:
        self._dataset = dataset
        self._indices = torch.arange(len(dataset)) if indices is None else indices
        if len(self._indices) == 0:
            raise UserError("The dataset is empty; give at least one image.")
        image, first = self._checked_item()
        channels, height, width = image.shape
        self.image_shape = (channels, height, width)
        self._labels: Tensor | None = None
        whole = not first.is_floating_point() or bool(n_classes)  # a number of classes means labels
        self._classified = n_classes != 0 and first.numel() == 1 and whole
        self.target_shape = () if self._classified else tuple(first.shape)
        self.n_classes = n_classes or 0 if self._classified else 0
        if self._classified and not n_classes:
            self.n_classes = len(getattr(dataset, "classes", ())) or int(self.labels.max()) + 1

    def _checked_item(self) -> tuple[Tensor, Tensor]:
        item = self._dataset[int(self._indices[0])]
        if not (isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], Tensor)):
            raise UserError(f"A dataset must give (image tensor, label), got {type(item).__name__}; add a transform.")
        if item[0].ndim != 3 or not item[0].is_floating_point():
            raise UserError(
                f"Dataset images must be floating tensors (channels, height, width), "
                f"got {item[0].dtype} of shape {tuple(item[0].shape)}; convert them in the dataset's transform."
            )
        return item[0], _target(item[1])

    @property
    def labels(self) -> Tensor:
        """All labels, int64 (len,), or targets (len, ...); labels are read once."""
        if not self._classified:
            return self._stacked([self._dataset[int(index)][1] for index in self._indices])
        if self._labels is None:
            targets = getattr(self._dataset, "targets", None)
            if targets is not None:
                self._labels = torch.as_tensor(targets).long()[self._indices]
            else:
                self._labels = torch.tensor([int(self._dataset[int(index)][1]) for index in self._indices])
        return self._labels

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Indices int64 (B,) -> images float32 (B, C, H, W) and labels int64 (B,), or targets (B, ...).

        UserError for NaN, bad labels and targets that differ in shape.
        """
        items = [self._dataset[int(index)] for index in self._indices[indices]]
        shapes = {tuple(image.shape) for image, _ in items}
        if shapes != {self.image_shape}:
            raise UserError(f"Dataset images differ in shape: {sorted(shapes)}, the first was {self.image_shape}.")
        images = torch.stack([image for image, _ in items]).to(torch.float32)
        if not torch.isfinite(images).all():
            raise UserError("The dataset gave images with NaN or infinite values; fix or remove them.")
        if not self._classified:
            return images, self._stacked([target for _, target in items])
        labels = torch.tensor([int(label) for _, label in items])
        if labels.min() < 0 or labels.max() >= self.n_classes:
            raise UserError(
                f"Dataset labels must lie in 0..{self.n_classes - 1}, got {int(labels.min())}..{int(labels.max())}."
            )
        return images, labels

    def _stacked(self, found: Sequence[Any]) -> Tensor:
        targets = [_target(each) for each in found]
        shapes = {tuple(each.shape) for each in targets}
        if shapes != {self.target_shape}:
            raise UserError(
                f"Dataset targets differ in shape: {sorted(shapes)}, the first was {self.target_shape}; give all of "
                "them one shape."
            )
        stacked = as_targets(torch.stack(targets))
        if not torch.isfinite(stacked).all():
            raise UserError("The dataset gave targets with NaN or infinite values; fix or remove them.")
        return stacked

    def select(self, indices: Tensor) -> Self:
        """Only the images at `indices` int64, in that order (a view)."""
        selected = type(self)(self._dataset, self.n_classes, self._indices[indices])
        selected._labels = None if self._labels is None else self._labels[indices]
        return selected

    def digest(self) -> str:
        """sha256 over the labels or targets (the pixels lie in the dataset and are not read)."""
        if self._classified:
            return hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()
        digest = hashlib.sha256()
        for index in self._indices:  # one by one: maps of all images may not fit into memory
            digest.update(_target(self._dataset[int(index)][1]).contiguous().numpy().tobytes())
        return digest.hexdigest()


def as_targets(values: Tensor) -> Tensor:
    """Targets in the types that losses take: int64 or float32."""
    return values.to(torch.float32 if values.is_floating_point() else torch.int64)


def _target(value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"A dataset must give an integer label, or a target that is a number, an array or a tensor; got "
            f"{type(value).__name__}: convert it in the dataset."
        ) from error
