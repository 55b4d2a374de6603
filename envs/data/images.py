"""Images, signals and volumes with their targets behind one small interface, and arrays held in memory.

An image is (channels, height, width), a signal (channels, length), a volume or video (channels, depth, height, width).
Targets are labels, one integer per image, or, for another metric than top-1, tensors of one shape: class maps, numbers.

Shape suffixes: B images of a batch.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...errors import UserError
from .packing import Packing


class LabelledImages(Protocol):
    """What training, criteria and rewards read: normalised float images and their targets, by index."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of every image; (channels, length) of signals and so on."""

    @property
    def n_classes(self) -> int:
        """Labels lie in [0, n_classes); 0 where targets are not labels."""

    @property
    def labels(self) -> Tensor:
        """All labels, int64 (len,), or targets (len, ...)."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Indices int64 (B,) -> images float32 (B, C, ...), normalised, and labels int64 (B,).

        Other targets are (B, ...), int64 or float32.
        """

    def select(self, indices: Tensor) -> LabelledImages:
        """Only the images at `indices` int64, in that order."""

    def digest(self) -> str:
        """sha256 hex digits that identify labels and pixels (pixels that are not in memory: an even sample)."""


def batches_of(
    data: LabelledImages, parts: Sequence[Tensor], pinned: bool = False
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """What `data.batch` gives for each of `parts`, int64 (B,) each, in their order.

    Data with a method `batches(parts, pinned)` is read ahead by it, for example by worker processes; other data when
    its turn comes. `pinned` batches lie in page-locked memory where they were read ahead, for a copy to a GPU that
    nobody waits for. Close the iterator (`contextlib.closing`) where it may not be read to its end.
    """
    ahead = getattr(data, "batches", None)
    if ahead is None:
        yield from map(data.batch, parts)
    else:
        yield from ahead(parts, pinned)


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
        for what in ("packing", "image_shape", "n_classes", "target_shape"):
            ours, theirs = getattr(self.train, what, None), getattr(self.test, what, None)
            if ours != theirs:
                said = "inputs" if what == "packing" else what
                raise UserError(f"Train and test images differ in {said}: {ours} against {theirs}; make them equal.")


class ArrayImages:
    """Images in memory, kept in their own type (uint8 takes a quarter of float32) and normalised batch by batch.

    `images`: uint8 or floating, (len, C, ...); `labels`: int64 (len,), or with `n_classes` 0 any targets (len, ...),
    kept in their own type, of which a batch is int64 or float32. `packing` says what lies where in items of several
    inputs. A batch of images is (images * scale - mean) / std
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
        packing: Packing | None = None,
    ) -> None:
        channels = images.shape[1]
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise UserError(
                f"Normalisation needs one mean and one positive std for each of the {channels} channels, "
                f"got mean={list(mean)} and std={list(std)}."
            )
        if len(images) != len(labels):
            raise UserError(f"There are {len(images)} images but {len(labels)} labels; give one label per image.")
        self._images, self.n_classes, self.packing = images, n_classes, packing
        self._digest: str | None = None
        self.labels = labels.long() if n_classes else labels
        self.target_shape = tuple(labels.shape[1:])
        self._scale = scale if scale is not None else (1.0 if images.is_floating_point() else 1 / 255)
        self._mean, self._std = tuple(mean), tuple(std)
        per_channel = (1, -1, *[1] * (images.dim() - 2))
        self._factor = (self._scale / torch.tensor(std, dtype=torch.float32)).view(per_channel)
        self._shift = (torch.tensor(mean, dtype=torch.float32) / torch.tensor(std)).view(per_channel)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of every image; (channels, length) of signals and so on."""
        return tuple(self._images.shape[1:])

    def __len__(self) -> int:
        return len(self._images)

    @property
    def n_bytes(self) -> int:
        """Memory of the images and their targets."""
        return sum(each.numel() * each.element_size() for each in (self._images, self.labels))

    def on(self, device: torch.device) -> ArrayImages:
        """The same images, kept and normalised on a device, where `batch` takes indices and answers."""
        moved = copy.copy(self)
        for name in ("_images", "labels", "_factor", "_shift"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Indices int64 (B,) -> images float32 (B, C, ...), normalised, and labels int64 (B,) or targets (B, ...)."""
        images = self._images[indices].to(torch.float32)
        return images.mul_(self._factor).sub_(self._shift), as_targets(self.labels[indices])

    def select(self, indices: Tensor) -> ArrayImages:
        """Only the images at `indices` int64, in that order (a copy)."""
        return ArrayImages(
            self._images[indices],
            self.labels[indices],
            self._mean,
            self._std,
            self.n_classes,
            self._scale,
            self.packing,
        )

    def digest(self) -> str:
        """sha256 over labels, pixels and normalisation; computed once, as splits and every training ask for it."""
        if self._digest is None:
            self._digest = self._computed_digest()
        return self._digest

    def _computed_digest(self) -> str:
        digest = hashlib.sha256(f"{self.image_shape} {self._mean} {self._std} {self._scale}".encode())
        digest.update(self.labels.contiguous().numpy().tobytes())
        # NHWC is how most arrays arrive, so this is a view and not a copy.
        digest.update(self._images.movedim(1, -1).contiguous().numpy().data)
        return digest.hexdigest()


def as_targets(values: Tensor) -> Tensor:
    """Targets in the types that losses take: int64 or float32."""
    return values.to(torch.float32 if values.is_floating_point() else torch.int64)
