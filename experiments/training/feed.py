"""Batches of a training where its network is: images that stay on a GPU, or copies while it works; augmented there."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from ...envs.data.images import ArrayImages, LabelledImages, batches_of
from ...envs.data.objective import without_objective
from .augment import Augment, drawn_apart
from .devices import Team

SHARE = 3  # of the memory that is free on a GPU, a third at most may be taken by images that stay there


class Feed:
    """Images and targets of every step of an epoch, augmented, on a device.

    What chance decides is drawn on the CPU, so that the same seed gives the same batches everywhere: by
    `RandomCropFlip` for a whole epoch at once, by another augmentation when its turn comes, on CPU images as it always
    was. In both cases these are the numbers that the steps would draw one after another.

    Args:
        data: the fit images.
        augment: what is done to them.
        device: where the network is.
        stay: whether images in memory are taken there once, if a third of its free memory has room for them.
    """

    def __init__(self, data: LabelledImages, augment: Augment | None, device: torch.device, stay: bool = False) -> None:
        self.data, self.augment, self.device = data, augment, device
        self.apart = drawn_apart(augment)
        self.resident: ArrayImages | None = None
        bare = without_objective(data)
        if isinstance(bare, ArrayImages) and stay and self.is_reproducible:
            self.resident = bare.on(device) if bare.n_bytes <= free_bytes(device) // SHARE else None

    @property
    def is_reproducible(self) -> bool:
        """Whether seed and step alone say what a batch holds: images in memory, and no code of a user's for them."""
        in_memory = type(without_objective(self.data)) is ArrayImages
        return in_memory and (self.augment is None or self.apart is not None)

    @property
    def is_binary(self) -> bool:
        """Whether the targets, all of them in memory, are 0 and 1."""
        targets = self.data.labels if self.is_reproducible else torch.full((1,), 2)
        return bool(((targets == 0) | (targets == 1)).all())

    def epoch(
        self, order: Sequence[Tensor], generator: torch.Generator, team: Team | None = None
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """The batch of each part of `order`, int64 (B,) each; with several devices, this one's share of it.

        All processes draw the same for all images, so what is augmented is read whole.
        """
        drawn = self._drawn(order, generator)
        parts = order if team is None or self.augment is not None else [team.share(each) for each in order]
        with closing(self._read(parts)) as read:
            for (images, targets), numbers in zip(read, drawn, strict=True):
                if self.augment is not None and self.apart is None:
                    images = self.augment(images, generator)
                images, targets = self._sent(images), self._sent(targets)
                if self.apart is not None:
                    images = self.apart.move(images, *numbers)
                if team is not None and self.augment is not None:
                    images, targets = team.share(images), team.share(targets)
                yield images, targets

    def _read(self, parts: Sequence[Tensor]) -> Generator[tuple[Tensor, Tensor], None, None]:
        if self.resident is None:
            return batches_of(self.data, parts, pinned=self.device.type == "cuda")
        return batches_of(self.resident, list(_sent_together(parts, self.device)))

    def _drawn(self, order: Sequence[Tensor], generator: torch.Generator) -> Iterable[tuple[Tensor, ...]]:
        """What chance decides in each step, on the device; nothing where an augmentation draws for itself."""
        if self.apart is None:
            return [()] * len(order)
        steps = [self.apart.draw(len(each), generator) for each in order]
        kinds = [_sent_together(kind, self.device) for kind in zip(*steps, strict=True)]
        return zip(*kinds, strict=True)

    def _sent(self, values: Tensor) -> Tensor:
        """On the device; from page-locked memory, so that the host does not wait for the copy."""
        if self.device.type == "cuda" and values.device.type == "cpu" and not values.is_pinned():
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that nobody uses; none elsewhere."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def _sent_together(parts: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The parts on the device, by one copy."""
    if not parts:
        return iter(())
    return iter(torch.cat(list(parts)).to(device).split([len(each) for each in parts]))
