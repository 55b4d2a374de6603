"""Accuracy of a network on images, under masks or as it is: points per image (`objective`), right or wrong for top-1.

Points are integers, so that sums of them do not depend on batches or order; accuracy is made of them elsewhere. What is
known about a mask is remembered image by image, so that a mask that comes again costs nothing and disturbs no random
stream.

Shapes: M masks, N filters, B images.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..data.images import LabelledImages
from ..data.objective import TOP1, Objective, objective_of, output_of
from ..networks.batch_size import cached_batch, chunks, default_batch, fastest_batch
from ..networks.memory_layout import CHANNELS_LAST, arranged, is_channels_last, layout_of
from ..networks.modes import evaluating
from ..surgery.filter_group import FilterGroup
from ..surgery.masking import MixKey
from .masked_network import Frontier, MaskedNetwork

GIB = 2**30
MOST_REMEMBERED = 2**26  # numbers of four bytes, where an image has a row of them
Masks = Mapping[str, Tensor]
Mixes = Mapping[MixKey, Tensor]


class MaskEvaluator:
    """Counts right answers, or points, under keep masks, on images that stay in memory.

    Args:
        model: the network, never changed.
        groups: the groups whose masks will vary.
        images: (B, C, H, W) float, where they are to be evaluated.
        labels: (B,) int64, or other targets (B, ...).
        cache_gib: memory for the frontier; if it needs more, it is computed again chunk by chunk.
        method: "auto", "split" or "whole" (`MaskedNetwork`).
        batch: images per pass, times masks where these run in one batch; None measures which is the fastest,
            in half a second at most.
        dtype: "float32" or "bfloat16" (`MaskedNetwork`).
        compile: run the suffix through `torch.compile`.
        stack: run many masks in one batch; None does so on a GPU (`MaskedNetwork`).
        memory: number of masks whose answers are remembered (one byte per image for top-1, else four).
        objective: what answers are scored by.

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
        self._images, self._labels, self._objective = arranged(images, layout_of(model, images)), labels, objective
        self.network = MaskedNetwork(
            model, groups, self._images[:3], method=method, dtype=dtype, compile=compile, stack=stack
        )
        self._memory = MaskMemory(len(labels), memory, objective.dtype, objective.points_shape(labels))
        self._passes = MaskPasses(self.network, objective, batch or default_batch(labels.device))
        self._frontier = self._cache(int(cache_gib * GIB))
        if batch is None and self._frontier is not None:
            with self.network.masked({}, 0) as run:
                self._passes.batch = fastest_batch(run, self._frontier)

    @property
    def batch(self) -> int:
        """Images per pass, times masks where these run in one batch."""
        return self._passes.batch

    @property
    def cached_bytes(self) -> int:
        """Memory that the frontier takes; 0 if it is computed again for every call."""
        return sum(value.numel() * value.element_size() for value in self._frontier or ())

    def correct(
        self,
        masks: Masks,
        *,
        image_indices: Tensor | None = None,
        mixes: Mixes | None = None,
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
        masks: Masks,
        *,
        image_indices: Tensor | None = None,
        mixes: Mixes | None = None,
    ) -> Tensor:
        """Points under each mask, (M, B) or (M, B') with `image_indices`: bool, right or not, for top-1, else int32.

        A row of them per image, (M, B, W), where the objective's points are rows.
        """
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

    def _computed(self, masks: Masks, images: Tensor, mixes: Mixes) -> Tensor:
        """Points of the images, (B',) int64, under each mask: (M, B')."""
        if len(images) == 1:  # never alone: see the class
            return self._computed(masks, images.repeat(2), mixes)[:, :1]
        images = images.to(self._labels.device)
        values = (self._images,) if self._frontier is None else self._frontier
        if len(images) != len(self._labels) or not torch.equal(images.cpu(), torch.arange(len(images))):
            values = tuple(value[images] for value in values)
        labels = self._labels[images]
        if self._frontier is not None:
            return self._passes.points(values, labels, masks, mixes)
        # Without a cache every chunk goes through the prefix once and then through all masks.
        found = []
        for rows in chunks(len(labels), self.batch):
            frontier = self.network.prefix(values[0][rows])
            found.append(self._passes.points(frontier, labels[rows], masks, mixes))
        return torch.cat(found, 1)

    def _cache(self, budget_bytes: int) -> Frontier | None:
        if self.network.method == "whole":
            return self.network.prefix(self._images)
        kept: Frontier | None = None
        for rows in chunks(len(self._labels), self.batch):
            frontier = self.network.prefix(self._images[rows])
            if kept is None:
                row_bytes = sum(value[0].numel() * value.element_size() for value in frontier)
                if row_bytes * len(self._labels) > budget_bytes:
                    return None
                kept = tuple(_room(value, len(self._labels)) for value in frontier)
            for place, value in zip(kept, frontier, strict=True):
                place[rows] = value
        return kept

    def _checked(self, masks: Masks) -> int:
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


@dataclass
class MaskPasses:
    """Passes of the suffix under masks: one mask after another, or all of them in one batch.

    Attributes:
        network: the network whose suffix runs.
        objective: what answers are scored by.
        batch: images per pass, times masks where these share it; halved where a GPU's memory is not enough.
    """

    network: MaskedNetwork
    objective: Objective
    batch: int

    def points(self, frontier: Frontier, labels: Tensor, masks: Masks, mixes: Mixes) -> Tensor:
        """Points (M, B) of the frontier's images under M masks, on the CPU."""
        n_masks = len(next(iter(masks.values())))
        run = self._in_one_batch if self.network.stacks and n_masks > 1 else self._one_by_one
        found = self.objective.room(n_masks, labels)
        while True:
            try:
                run(found, frontier, labels, masks, mixes)
                return found
            except torch.OutOfMemoryError:
                if self.batch <= 2:
                    raise
                self.batch //= 2

    def _one_by_one(self, found: Tensor, frontier: Frontier, labels: Tensor, masks: Masks, mixes: Mixes) -> None:
        for index, own in enumerate(found):
            with self.network.masked(masks, index, mixes) as run:
                for rows in chunks(len(labels), self.batch):
                    outputs = run(tuple(value[rows] for value in frontier))
                    own[rows] = self.objective.points(outputs, labels[rows]).cpu()

    def _in_one_batch(self, found: Tensor, frontier: Frontier, labels: Tensor, masks: Masks, mixes: Mixes) -> None:
        run, n_masks = self.network.together(masks, mixes), len(found)
        for rows in chunks(len(labels), self.batch // n_masks):
            logits = run(tuple(value[rows] for value in frontier))
            targets = labels[rows].expand(n_masks, *labels[rows].shape).flatten(0, 1)
            found[:, rows] = self.objective.points(logits.flatten(0, 1), targets).unflatten(0, (n_masks, -1)).cpu()


class MaskMemory:
    """Points (right, wrong) or unknown for every image, for the masks used last.

    Args:
        n_images: B; an entry takes B bytes, or four times as many for other points than right and wrong.
        size: entries kept; the one used longest ago goes first.
        dtype: of an image's points.
        shape: of an image's points; where they are rows, no more entries are kept than fit into a quarter of a GiB.
    """

    def __init__(self, n_images: int, size: int, dtype: torch.dtype = torch.bool, shape: tuple[int, ...] = ()) -> None:
        self.shape = (n_images, *shape)
        self.size = min(size, max(1, MOST_REMEMBERED // math.prod(self.shape))) if shape else size
        self.dtype = torch.int8 if dtype == torch.bool else dtype
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, key: bytes) -> Tensor:
        """(B,) or (B, W) to read and fill: 1 right, 0 wrong (or points), -1 unknown. It outlives its place in here."""
        found = self._entries.pop(key, None)
        if found is None:
            found = torch.full(self.shape, -1, dtype=self.dtype)
        self._entries[key] = found
        while len(self._entries) > self.size:
            self._entries.popitem(last=False)
        return found


def mask_key(masks: Masks, mixes: Mixes | None, index: int) -> bytes:
    """A digest of mask number `index` and of everything that is mixed under it."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(masks):
        digest.update(name.encode() + b"\0" + masks[name][index].cpu().contiguous().numpy().tobytes())
    for key in sorted(mixes or {}):
        digest.update("\0".join(key).encode() + b"\0" + (mixes or {})[key][index].cpu().contiguous().numpy().tobytes())
    return digest.digest()


def _by_images(
    keys: Sequence[bytes], known: Mapping[bytes, Tensor], indices: Tensor
) -> Iterator[tuple[Tensor, list[int]]]:
    """Images (B',) not yet known, and the rows of the distinct masks of which exactly these are not known."""
    groups: dict[bytes, tuple[Tensor, list[int]]] = {}
    for row, key in enumerate(keys):
        answers = known[key][indices]
        missing = indices[(answers if answers.dim() == 1 else answers[:, 0]) < 0]
        if len(missing) and keys.index(key) == row:
            groups.setdefault(missing.numpy().tobytes(), (missing, []))[1].append(row)
    yield from groups.values()


def _room(like: Tensor, rows: int) -> Tensor:
    """An empty tensor of `rows` rows in the memory order of `like`."""
    room = like.new_empty(rows, *like.shape[1:])
    return arranged(room, CHANNELS_LAST) if is_channels_last(like) else room


def correct_flags(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch: int | None = None,
    objective: Objective = TOP1,
    layout: torch.memory_format | None = None,
) -> Tensor:
    """Points of the images (B, C, H, W) in evaluation mode, (B,) on the CPU: bool, right or wrong, for top-1.

    `batch` is the number of images per pass; None takes what stays in a processor's cache. `layout` is the network's
    (`layout_of`); None tries it out.
    """
    return points_against(model, images, [labels], batch, objective, layout)[0]


@torch.inference_mode()
def points_against(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[Tensor],
    batch: int | None = None,
    objective: Objective = TOP1,
    layout: torch.memory_format | None = None,
) -> list[Tensor]:
    """`correct_flags` against each of `targets`, (B, ...) each, in one pass over the images."""
    layout = layout_of(model, images) if layout is None else layout
    found: list[list[Tensor]] = [[] for _ in targets]
    with evaluating(model):
        for rows in chunks(len(images), batch or cached_batch(images)):
            outputs = output_of(model(arranged(images[rows], layout)))
            for points, each in zip(found, targets, strict=True):
                # Metrics of a user's own may write into the outputs.
                given = outputs if len(targets) == 1 else outputs.clone()
                points.append(objective.points(given, each[rows]))
    return [torch.cat(points).cpu().clone() for points in found]


def count_correct(model: nn.Module, data: LabelledImages, batch: int = 500) -> tuple[int, int]:
    """Right answers and images of a data set (points and points of perfect answers under another metric than top-1).

    In evaluation mode; the model is left in the mode it had.
    """
    correct = sum(int(points.sum()) for points in _points_by_batch(model, data, batch))
    return correct, objective_of(data).unit * len(data)


def _points_by_batch(model: nn.Module, data: LabelledImages, batch: int) -> Iterator[Tensor]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for start in range(0, len(data), batch):
        images, labels = data.batch(torch.arange(start, min(start + batch, len(data))))
        yield correct_flags(model, images.to(device), labels.to(device), objective=objective_of(data))


def accuracy_on(model: nn.Module, data: LabelledImages) -> float:
    """Accuracy, or the score under the data's metric, a fraction, in evaluation mode."""
    return objective_of(data).fraction(torch.cat(list(_points_by_batch(model, data, 500))))
