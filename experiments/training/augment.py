"""Random crops and flips of a whole batch at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ...envs.data.images import LabelledImages
from ...envs.data.objective import objective_of
from ...errors import UserError
from ...ranges import check_number

Augment = Callable[[Tensor, Generator], Tensor]


class RandomCropFlip:
    """Shift every image by up to `padding` pixels each way and mirror half of them.

    (images (B, C, H, W), CPU generator) -> images of the same shape. Images come normalised, so the zeros shifted in
    are the mean colour. Source: the augmentation of He et al. 2016 (arXiv 1512.03385), section 4.2, padding 4.

    What chance decides is drawn apart from where images are moved, so that a GPU moves the images that lie on it, by
    the numbers that a CPU would have drawn.
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        if padding < 0:
            raise UserError(f"Augmentation needs a padding of 0 or more pixels, got {padding}.")
        check_number("augment.padding", padding, (0, 1024))
        self.padding, self.flip = int(padding), flip

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Images (B, C, H, W) -> a randomly shifted and mirrored copy."""
        drawn = self.draw(len(images), generator)
        return self.move(images, *(each.to(images.device) for each in drawn))

    def draw(self, n_images: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Shifts int64 (B, 2), rows and columns cut off in front, and who is mirrored, bool (B,), on the CPU."""
        shifts, mirrored = torch.zeros(n_images, 2, dtype=torch.int64), torch.zeros(n_images, dtype=torch.bool)
        if self.padding:
            shifts = torch.randint(2 * self.padding + 1, (2, n_images), generator=generator).T
        if self.flip:
            mirrored = torch.rand(n_images, 1, 1, 1, generator=generator).flatten() < 0.5
        return shifts, mirrored

    def move(self, images: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
        """Images (B, C, H, W) moved by what `draw` gave for them, all on one device."""
        if self.padding:
            images = self._shift(images, shifts)
        if self.flip:
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images

    def _shift(self, images: Tensor, shifts: Tensor) -> Tensor:
        height, width = images.shape[2:]
        padded = F.pad(images, (self.padding,) * 4)
        # All (2 padding + 1)^2 crops as one view without a copy; each image picks its own.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        return crops[torch.arange(len(images), device=images.device), :, shifts[:, 0], shifts[:, 1]]


def drawn_apart(augment: Augment | None) -> RandomCropFlip | None:
    """The augmentation if what it draws does not depend on images, else None; a subclass may call itself otherwise."""
    if isinstance(augment, RandomCropFlip) and type(augment).__call__ is RandomCropFlip.__call__:
        return augment
    return None


def suits(data: LabelledImages) -> bool:
    """Whether images may be shifted and mirrored without another look: images with classes, and not with maps of them.

    Numbers may be coordinates, and classes of a map belong to places; signals and volumes are not shifted at all.
    """
    if len(data.image_shape) != 3 or data.n_classes > 0:
        return len(data.image_shape) == 3
    objective, targets = objective_of(data), data.batch(torch.arange(1))[1]
    classes = bool(objective.binary) or bool(getattr(objective.metric, "needs_classes", False))
    return classes and targets.shape[-2:] != data.image_shape[-2:]


def check_augment(augment: Augment | None, data: LabelledImages) -> None:
    """UserError where an augmentation cannot move these images, or would not move the maps that are their targets."""
    if isinstance(augment, RandomCropFlip) and len(data.image_shape) != 3:
        raise UserError(
            f"{type(augment).__name__} shifts and mirrors images (channels, height, width), and these are "
            f"{data.image_shape}; leave it out",
            python="(augment=None), or give a function of your own.",
            typed="(augment=null), or give a function of your own.",
        )
    if augment is None or data.n_classes > 0:
        return
    if isinstance(augment, RandomCropFlip) and objective_of(data).needs_boxes:
        raise UserError(
            f"{type(augment).__name__} moves the images and not the boxes that are their targets; leave it out",
            python="(augment=None) and augment in your own data set.",
            typed="(augment=null) and augment in your own data set.",
        )
    targets = data.batch(torch.arange(1))[1]
    if targets.shape[-2:] == data.image_shape[-2:]:
        raise UserError(
            f"Targets of shape {tuple(targets.shape[1:])} are maps of the images, and augmentation moves the images "
            "only; leave it out",
            python="(augment=None) and augment in your own data set.",
            typed="(augment=null) and augment in your own data set.",
        )
