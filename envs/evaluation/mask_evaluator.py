"""How well a network answers on images, masked or not: points image by image (`objective`), right or wrong for top-1.

Points are integers, so that sums of them do not depend on batches or order; accuracy is made of them elsewhere.

Shapes: M masks, N filters, B images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..data.objective import TOP1, Objective, objective_of
from ..networks.batch_size import chunks, default_batch, fastest_batch
from ..networks.modes import evaluating
from ..surgery.filter_group import FilterGroup
from ..surgery.masking import MixKey
from .mask_memory import MaskMemory, mask_key
from .mask_passes import MaskPasses
from .masked_network import Frontier, MaskedNetwork

if TYPE_CHECKING:
    from ..data.sources import LabelledImages

GIB = 2**30


class MaskEvaluator:
    """Counts right answers, or points, under keep masks, on images that stay in memory.

    Args:
        model: the network, never changed.
        groups: the groups whose masks will vary.
        images: (B, C, H, W) float, where they are to be evaluated.
        labels: (B,) int64, or other targets (B, ...).
        cache_gib: memory for the frontier; if it needs more, it is computed again chunk by chunk.
        method: "auto", "split" or "whole" (`MaskedNetwork`).
        batch: images a pass, times masks where these run in one batch; None measures which is the fastest,
            in half a second at most.
        dtype: "float32" or "bfloat16" (`MaskedNetwork`).
        compile: run the suffix through `torch.compile`.
        stack: run many masks in one batch; None does so on a GPU (`MaskedNetwork`).
        memory: answers (one byte an image; four but for top-1) of so many masks are remembered, and not computed again.
        objective: what answers are judged by.

    A mask's count does not depend on the other masks, their number or order, nor on `batch`, `cache_gib` or `memory`:
    on a CPU an image's logits are bitwise the same in every chunk of two images or more, and no chunk is smaller.
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
        batch: int | None = None,
        dtype: str = "float32",
        compile: bool = False,
        stack: bool | None = None,
        memory: int = 1024,
        objective: Objective = TOP1,
    ) -> None:
        if len(images) != len(labels) or len(images) == 0 or (batch is not None and batch < 1):
            raise UserError(
                f"Expected as many labels as images, at least one, and a batch of 1 or more; got {len(images)} images, "
                f"{len(labels)} labels, batch={batch}."
            )
        images = channels_last(images)
        self._budget_bytes, self._memory_size, self._objective = int(cache_gib * GIB), memory, objective
        network = MaskedNetwork(model, groups, images[:3], method=method, dtype=dtype, compile=compile, stack=stack)
        self._adopt(network, (images,), labels, batch)

    def _adopt(self, network: MaskedNetwork, inputs: Frontier, labels: Tensor, batch: int | None) -> None:
        self.network, self._inputs, self._labels = network, inputs, labels
        self._memory = MaskMemory(len(labels), self._memory_size, self._objective.dtype)
        self._passes = MaskPasses(network, self._objective, batch or default_batch(labels.device))
        self._frontier = self._cache()
        if batch is None and self._frontier is not None:
            with self.network.masked({}, 0) as run:
                self._passes.batch = fastest_batch(run, self._frontier)

    def advanced(self, masks: Mapping[str, Tensor], mixes: Mapping[MixKey, Tensor] | None = None) -> MaskEvaluator:
        """An evaluator in which some groups are decided for good, and whose frontier lies behind them.

        For decisions from low to high: it starts from this one's cached frontier, so that only what lies between the
        two is computed, once, instead of again for every mask of the groups that are left.

        Args:
            masks: (N,) bool a group.
            mixes: (N, N) each, applied instead of the mask.
        """
        one = {name: mask[None] for name, mask in masks.items()}
        self._checked(one)
        cached = self._frontier is not None and self.method == "split"
        inputs = self._frontier if cached and self._frontier is not None else self._inputs
        network = self.network.advanced(
            one,
            {key: mix[None] for key, mix in (mixes or {}).items()},
            tuple(value[:3] for value in inputs),
            from_frontier=cached,
        )
        result = copy.copy(self)
        result._adopt(network, inputs, self._labels, self.batch)
        return result

    @property
    def batch(self) -> int:
        """Images a pass, times masks where these run in one batch."""
        return self._passes.batch

    @property
    def method(self) -> str:
        """ "split" or "whole"."""
        return self.network.method

    @property
    def frontier(self) -> Frontier | None:
        """What is cached of every image; None if it is computed again for every call."""
        return self._frontier

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
        """Right answers, or points, under each of M masks: (M,) int64.

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
        """Points under each mask, (M, B) or (M, B') with `image_indices`: bool, right or not, for top-1, else int32."""
        n_masks = self._checked(masks)
        indices = torch.arange(len(self._labels)) if image_indices is None else image_indices.cpu()
        keys = [mask_key(masks, mixes, index) for index in range(n_masks)]
        known = {key: self._memory.entry(key) for key in keys}
        for images, rows in _by_images(keys, known, indices):
            chosen = {name: mask[rows] for name, mask in masks.items()}
            mixed = {key: mix[rows] for key, mix in (mixes or {}).items()}
            flags = self._computed(chosen, images, mixed)
            for row, each in zip(rows, flags, strict=True):
                known[keys[row]][images] = each.to(self._memory.dtype)
        return torch.stack([known[key][indices] for key in keys]).to(self._objective.dtype)

    def _computed(self, masks: Mapping[str, Tensor], images: Tensor, mixes: Mapping[MixKey, Tensor]) -> Tensor:
        """Points of the images, (B',) int64, under each mask: (M, B')."""
        if len(images) == 1:  # never alone: see the class
            return self._computed(masks, images.repeat(2), mixes)[:, :1]
        images = images.to(self._labels.device)
        values = self._inputs if self._frontier is None else self._frontier
        if len(images) != len(self._labels) or not torch.equal(images.cpu(), torch.arange(len(images))):
            values = tuple(value[images] for value in values)
        labels = self._labels[images]
        if self._frontier is not None:
            return self._passes.points(values, labels, masks, mixes)
        # Without a cache every chunk goes through the prefix once and then through all masks.
        found = []
        for rows in chunks(len(labels), self.batch):
            frontier = self.network.prefix(*(value[rows] for value in values))
            found.append(self._passes.points(frontier, labels[rows], masks, mixes))
        return torch.cat(found, 1)

    def _cache(self) -> Frontier | None:
        if self.network.method == "whole":
            return self.network.prefix(*self._inputs)
        kept: Frontier | None = None
        for rows in chunks(len(self._labels), self.batch):
            frontier = self.network.prefix(*(value[rows] for value in self._inputs))
            if kept is None:
                row_bytes = sum(value[0].numel() * value.element_size() for value in frontier)
                if row_bytes * len(self._labels) > self._budget_bytes:
                    return None
                kept = tuple(_room(value, len(self._labels)) for value in frontier)
            for place, value in zip(kept, frontier, strict=True):
                place[rows] = value
        return kept

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


def _by_images(
    keys: Sequence[bytes], known: Mapping[bytes, Tensor], indices: Tensor
) -> Iterator[tuple[Tensor, list[int]]]:
    """Images (B',) not yet known, and the rows of the distinct masks of which exactly these are not known."""
    groups: dict[bytes, tuple[Tensor, list[int]]] = {}
    for row, key in enumerate(keys):
        missing = indices[known[key][indices] < 0]
        if len(missing) and keys.index(key) == row:
            groups.setdefault(missing.numpy().tobytes(), (missing, []))[1].append(row)
    yield from groups.values()


def channels_last(images: Tensor) -> Tensor:
    """Images in the memory order that convolutions on a CPU like best; other tensors as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def _room(like: Tensor, rows: int) -> Tensor:
    """An empty tensor of `rows` rows in the memory order of `like`."""
    room = like.new_empty(rows, *like.shape[1:])
    return channels_last(room) if is_channels_last(like) else room


def is_channels_last(value: Tensor) -> bool:
    """Whether a 4d tensor lies in memory as channels_last."""
    return value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def correct_flags(
    model: nn.Module, images: Tensor, labels: Tensor, batch: int = 256, objective: Objective = TOP1
) -> Tensor:
    """Points of the images (B, C, H, W) in evaluation mode, (B,) on the CPU: bool, right or wrong, for top-1."""
    with evaluating(model):
        points = [
            objective.points(model(channels_last(images[start : start + batch])), labels[start : start + batch])
            for start in range(0, len(images), batch)
        ]
    return torch.cat(points).cpu().clone()


def count_correct(model: nn.Module, data: LabelledImages, batch: int = 500) -> tuple[int, int]:
    """Right answers and images of a data set (points and points of perfect answers under another metric than top-1).

    In evaluation mode; the model is left in the mode it had.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    objective, correct = objective_of(data), 0
    for start in range(0, len(data), batch):
        images, labels = data.batch(torch.arange(start, min(start + batch, len(data))))
        correct += int(correct_flags(model, images.to(device), labels.to(device), batch, objective).sum())
    return correct, objective.unit * len(data)


def accuracy_on(model: nn.Module, data: LabelledImages) -> float:
    """Accuracy, or the mean score under the data's measure, a fraction; see `count_correct`."""
    correct, total = count_correct(model, data)
    return correct / total
