"""Random crops and flips of a whole batch at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ...errors import UserError

Augment = Callable[[Tensor, Generator], Tensor]


class RandomCropFlip:
    """Shift every image by up to `padding` pixels each way and mirror half of them.

    (images (B, C, H, W), CPU generator) -> images of the same shape. Images come normalised, so the zeros shifted in
    are the mean colour. Source: the augmentation of He et al. 2016 (arXiv 1512.03385), section 4.2, padding 4.
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        if padding < 0:
            raise UserError(f"Augmentation needs a padding of 0 or more pixels, got {padding}.")
        self.padding, self.flip = padding, flip

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Images (B, C, H, W) -> a randomly shifted and mirrored copy."""
        if self.padding:
            images = self._shift(images, generator)
        if self.flip:
            mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
            images = torch.where(mirrored.to(images.device), images.flip(3), images)
        return images

    def _shift(self, images: Tensor, generator: Generator) -> Tensor:
        height, width = images.shape[2:]
        padded = F.pad(images, (self.padding,) * 4)
        # All (2 padding + 1)^2 crops as one view without a copy; each image picks its own.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        rows, columns = torch.randint(2 * self.padding + 1, (2, len(images)), generator=generator).to(images.device)
        return crops[torch.arange(len(images), device=images.device), :, rows, columns]
