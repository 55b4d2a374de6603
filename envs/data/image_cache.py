"""A cache of decoded images, uint8, under one budget of memory for the training and the test images together.

Workers decode what is missing; the process that asks for images keeps them, so that no image lies in memory twice.
First come, first kept: in an epoch every image is read once, and which ones are kept makes no difference.

Shape suffixes: B images of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 32 * 2**20  # taken from the budget at a time, so that nothing is reserved for images that do not come


class Budget:
    """Bytes that are left for decoded images."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = self.left = n_bytes

    def granted(self, count: int, each: int) -> int:
        """For how many of `count` images of `each` bytes there is room; it is taken."""
        count = min(count, self.left // each)
        self.left -= count * each
        return count

    def __getstate__(self) -> dict[str, int]:
        """What another process gets: all of it, and an empty cache."""
        return {"n_bytes": self.n_bytes, "left": self.n_bytes}


class ImageCache:
    """Decoded images uint8 (C, H, W) of one source of `n_images`, by their index there."""

    def __init__(self, n_images: int, budget: Budget) -> None:
        self.n_images, self.budget = n_images, budget
        self._places = torch.full((n_images,), -1)
        self._blocks: list[Tensor] = []
        self._room = self._used = 0

    def __getstate__(self) -> dict[str, object]:
        """Images stay here: another process has a cache of its own."""
        return {"n_images": self.n_images, "budget": self.budget}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def n_bytes(self) -> int:
        """What is held."""
        return sum(each.numel() for each in self._blocks)

    def holds(self, indices: Tensor) -> Tensor:
        """Which of `indices` int64 (B,) are here, bool (B,)."""
        return self._places[indices] >= 0

    def image(self, index: int) -> Tensor:
        """One that is here, a view."""
        place = int(self._places[index])
        length = len(self._blocks[0])
        return self._blocks[place // length][place % length]

    def keep(self, indices: Tensor, images: Tensor) -> None:
        """Copy images uint8 (B, C, H, W), as many of them as there is room for."""
        for index, image in zip(indices.tolist(), images, strict=True):
            if not self._has_room(image):
                break
            if self._places[index] >= 0:
                continue
            self._places[index] = self._used
            self._used += 1
            self.image(index).copy_(image)

    def _has_room(self, image: Tensor) -> bool:
        if self._used < self._room:
            return True
        length = min(max(1, BLOCK_BYTES // image.numel()), self.n_images - self._room)
        length = self.budget.granted(length, image.numel())
        if length > 0:  # only the last block is shorter than the first
            self._blocks.append(torch.empty((length, *image.shape), dtype=torch.uint8))
            self._room += length
        return length > 0
