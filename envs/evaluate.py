"""How many images a network gets right, masked or not. Counts are integers; accuracy is made of them elsewhere.

Shapes: M masks, N filters, B images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..rewards.errors import UserError
from .groups import FilterGroup
from .masking import MixKey
from .modes import evaluating
from .split import Frontier, MaskedNetwork

if TYPE_CHECKING:
    from .data import LabelledImages

GIB = 2**30


class MaskEvaluator:
    """Counts right answers under keep masks, on images that stay in memory.

    Args:
        model: the network, never changed.
        groups: the groups whose masks will vary.
        images: (B, C, H, W) float, where they are to be evaluated.
        labels: (B,) int64.
        cache_gib: memory for the frontier; if it needs more, it is computed again chunk by chunk.
        method: "auto", "split" or "whole" (`MaskedNetwork`).
        batch: images a pass.

    A mask's count does not depend on the other masks, nor on their number: each one runs over the same chunks.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[FilterGroup],
        images: Tensor,
        labels: Tensor,
        *,
        cache_gib: float = 1.0,
        method: str = "auto",
        batch: int = 256,
    ) -> None:
        if len(images) != len(labels) or len(images) == 0 or batch < 1:
            raise UserError(
                f"Expected as many labels as images, at least one, and a batch of 1 or more; got {len(images)} images, "
                f"{len(labels)} labels, batch={batch}."
            )
        self._images, self._labels, self._batch = channels_last(images), labels, batch
        self.network = MaskedNetwork(model, groups, self._images[:3], method=method)
        self._frontier = self._cache(int(cache_gib * GIB))

    @property
    def method(self) -> str:
        """ "split" or "whole"."""
        return self.network.method

    @property
    def cached_bytes(self) -> int:
        """Memory that the frontier takes; 0 if it is computed again for every call."""
        return sum(value.numel() * value.element_size() for value in self._frontier or ())

    def correct(
        self,
        masks: Mapping[str, Tensor],
        *,
        image_indices: Tensor | None = None,
        mixes: Mapping[MixKey, Tensor] | None = None,
    ) -> Tensor:
        """Right answers under each of M masks: (M,) int64.

        Args:
            masks: group name -> (M, N) bool; a group that is not named keeps everything.
            image_indices: (B',) int64, the images to look at; None means all of them.
            mixes: (group, consumer) -> (M, N, N), applied instead of the mask (`Compensation.matrices`).
        """
        return self.correct_per_image(masks, image_indices=image_indices, mixes=mixes).sum(1)

    def correct_per_image(
        self,
        masks: Mapping[str, Tensor],
        *,
        image_indices: Tensor | None = None,
        mixes: Mapping[MixKey, Tensor] | None = None,
    ) -> Tensor:
        """Which images are right under each mask: (M, B) bool, or (M, B') with `image_indices`."""
        n_masks = self._checked(masks)
        indices = None if image_indices is None else image_indices.to(self._images.device)
        labels = self._labels if indices is None else self._labels[indices]
        flags = torch.empty(n_masks, len(labels), dtype=torch.bool)
        if self._frontier is None:
            self._chunk_by_chunk(masks, mixes, indices, labels, flags)
            return flags
        frontier = self._frontier if indices is None else tuple(value[indices] for value in self._frontier)
        for index in range(n_masks):
            with self.network.masked(masks, index, mixes) as run:
                for rows in self._chunks(len(labels)):
                    logits = run(tuple(value[rows] for value in frontier))
                    flags[index, rows] = (logits.argmax(1) == labels[rows]).cpu()
        return flags

    def _chunk_by_chunk(
        self,
        masks: Mapping[str, Tensor],
        mixes: Mapping[MixKey, Tensor] | None,
        indices: Tensor | None,
        labels: Tensor,
        flags: Tensor,
    ) -> None:
        """Without a cache every chunk goes through the prefix once and then through all masks."""
        images = self._images if indices is None else self._images[indices]
        for rows in self._chunks(len(labels)):
            frontier = self.network.prefix(images[rows])
            for index in range(len(flags)):
                with self.network.masked(masks, index, mixes) as run:
                    flags[index, rows] = (run(frontier).argmax(1) == labels[rows]).cpu()

    def _cache(self, budget_bytes: int) -> Frontier | None:
        if self.network.method == "whole":
            return (self._images,)
        kept: Frontier | None = None
        for rows in self._chunks(len(self._images)):
            frontier = self.network.prefix(self._images[rows])
            if kept is None:
                row_bytes = sum(value[0].numel() * value.element_size() for value in frontier)
                if row_bytes * len(self._images) > budget_bytes:
                    return None
                kept = tuple(_room(value, len(self._images)) for value in frontier)
            for place, value in zip(kept, frontier, strict=True):
                place[rows] = value
        return kept

    def _chunks(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self._batch):
            yield slice(start, min(start + self._batch, count))

    def _checked(self, masks: Mapping[str, Tensor]) -> int:
        sizes = {group.name: group.n_filters for group in self.network.groups}
        for name, mask in masks.items():
            if name not in sizes:
                raise ValueError(f"no group {name!r} here; expected some of {sorted(sizes)}.")
            if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] != sizes[name]:
                raise ValueError(
                    f"masks of {name!r} must be bool (M, {sizes[name]}), got {mask.dtype} {tuple(mask.shape)}."
                )
        counts = {len(mask) for mask in masks.values()}
        if len(counts) != 1:
            raise ValueError(f"every group needs the same number of masks, got {sorted(counts)}.")
        return counts.pop()


def channels_last(images: Tensor) -> Tensor:
    """Images in the memory order that convolutions on a CPU like best; other tensors as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def _room(like: Tensor, rows: int) -> Tensor:
    """An empty tensor of `rows` rows in the memory order of `like`."""
    return (
        channels_last(like.new_empty(rows, *like.shape[1:]))
        if is_channels_last(like)
        else like.new_empty(rows, *like.shape[1:])
    )


def is_channels_last(value: Tensor) -> bool:
    """Whether a 4d tensor lies in memory as channels_last."""
    return value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def correct_flags(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 256) -> Tensor:
    """Which of the images (B, C, H, W) the network gets right in evaluation mode: (B,) bool on the CPU."""
    with evaluating(model):
        right = [
            model(channels_last(images[start : start + batch])).argmax(1) == labels[start : start + batch]
            for start in range(0, len(images), batch)
        ]
    return torch.cat(right).cpu().clone()


def count_correct(model: nn.Module, data: LabelledImages, batch: int = 500) -> tuple[int, int]:
    """Right answers and images of a data set, in evaluation mode; the model is left in the mode it had."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    correct = 0
    for start in range(0, len(data), batch):
        images, labels = data.batch(torch.arange(start, min(start + batch, len(data))))
        correct += int(correct_flags(model, images.to(device), labels.to(device), batch).sum())
    return correct, len(data)
