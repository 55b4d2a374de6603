"""Data as a user has it: map-style datasets, DataLoaders, pairs of tensors or numpy arrays, read item by item.

What an item holds counts, not what its dataset says of itself: `targets` may hold names, or labels before a
`target_transform`, and `classes` may disagree with both.

Shape suffixes: B images of a batch.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import Notice, UserError
from .boxes import as_boxes, holds_boxes, padded
from .images import ArrayImages, LabelledData, LabelledImages, as_targets
from .items import (
    ARRAYS,
    evenly,
    image_of,
    label_of,
    listed_labels,
    loaded,
    pair_of,
    read_item,
    shown,
    target_of,
)
from .packing import Packing, is_several, packed_batch
from .randomness import random_states, randomness_restored
from .read_ahead import Workers, in_batches, item_seed, job_size, read_ahead

PROBES = 32  # items by which labels that a dataset lists are compared with those it gives
HASHED_ITEMS = 512  # of a split, whose pixels go into its digest


def from_datasets(train: Any, test: Any, n_classes: int | None = None, workers: int | None = None) -> LabelledData:
    """Training and test images from what you have; `keepdrop.from_datasets`.

    Args:
        train, test: each one of: a map-style dataset of (image, target), a `DataLoader` of one (its dataset, its
            transforms, its `collate_fn` and its subset are kept, its shuffling is not), or a pair (images, targets) of
            tensors or numpy arrays. An image is floating and normalised as the network takes it: (channels, height,
            width), (channels, length) of a signal, (channels, depth, height, width) of a volume or video. In its place
            may stand several inputs: a tuple of positional or a mapping of keyword arguments (`packing`). A target is
            an integer label from 0, or, for another metric than accuracy, anything of one shape, or boxes:
            {'boxes': (n, 4) as x1, y1, x2, y2, 'labels': (n,)}, any number of them per image (`boxes`).
        n_classes: labels lie in [0, n_classes). None: as many as the labels of both parts need. 0: targets are not
            labels, integers neither.
        workers: processes that read items ahead, in the order in which they are asked for; 0 reads in this process.
            None: the `num_workers` of a DataLoader (with its `worker_init_fn`), else 0. What a data set draws at random
            is then seeded item by item, the same for any number of workers above 0.

    Raises:
        UserError: items of another form, NaN in pairs, no items, or two parts that do not fit together.
    """
    if n_classes is None:
        n_classes = next((each.n_classes for each in (train, test) if _is_labelled_images(each)), None)
    ours, theirs = (
        labelled_images(source, name, n_classes, workers) for source, name in ((train, "train"), (test, "test"))
    )
    counted = n_classes is None and min(ours.n_classes, theirs.n_classes) > 0
    if counted and isinstance(ours, _OURS) and isinstance(theirs, _OURS):
        ours.n_classes = theirs.n_classes = max(ours.n_classes, theirs.n_classes)
    with_boxes = [each for each in (ours, theirs) if isinstance(each, DatasetImages) and each.box_room is not None]
    if len(with_boxes) == 2:
        most = max(each.box_room or 0 for each in with_boxes)
        for each in with_boxes:
            each.box_room = most
    return LabelledData(ours, theirs)


def labelled_images(source: Any, name: str, n_classes: int | None = None, workers: int | None = None) -> LabelledImages:
    """One part of `from_datasets`; a `LabelledImages` stays as it is. `name` stands in errors."""
    if isinstance(source, tuple | list) and len(source) == 2 and all(isinstance(part, ARRAYS) for part in source):
        return images_in_memory(target_of(source[0]), target_of(source[1]), name, n_classes)
    pair = source if isinstance(source, tuple | list) and len(source) == 2 else (None, None)
    if is_several(pair[0]) and isinstance(pair[1], ARRAYS):
        packed, packing = packed_batch(pair[0])
        images = images_in_memory(packed, target_of(pair[1]), name, n_classes)
        images.packing = packing
        return images
    if _is_labelled_images(source):
        return source.read_by(workers) if workers is not None and hasattr(source, "read_by") else source
    readers = Workers.chosen(source, workers)
    if isinstance(source, DataLoader):
        source = loaded(source, name)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, Mapping | str):
        read = DatasetImages(source, n_classes, workers=readers)
        read.check_randomness()
        return read
    raise UserError(
        f"{name} is a {type(source).__name__}; expected a map-style dataset of (image tensor, integer label), a "
        "DataLoader of one, or a pair (images, labels) of tensors or numpy arrays."
    )


def _is_labelled_images(source: Any) -> bool:
    return all(hasattr(source, wanted) for wanted in ("batch", "select", "digest"))


def images_in_memory(images: Tensor, targets: Tensor, name: str, n_classes: int | None = None) -> ArrayImages:
    """Images as the network takes them, floating (n, C, ...), with labels (n,) or (n, 1), or other targets (n, ...)."""
    if images.dim() < 3 or not images.is_floating_point() or targets.shape[:1] != images.shape[:1] or not len(images):
        raise UserError(
            f"{name} is images {images.dtype} {tuple(images.shape)} and labels {tuple(targets.shape)}; expected "
            "floating images (n, channels, height, width), normalised as the network takes them, and labels (n,)."
        )
    for what, values in (("images", images), ("targets", targets)):
        if not bool(torch.isfinite(values).all()):
            raise UserError(f"The {what} of {name} hold NaN or infinite values; fix or remove them.")
    if n_classes != 0 and targets.shape[1:].numel() == 1 and not targets.is_floating_point():
        targets = targets.reshape(-1)
    n_classes = _count_classes(targets, name, n_classes)
    zeros, ones = [0.0] * images.shape[1], [1.0] * images.shape[1]
    return ArrayImages(images.detach().cpu().float(), targets.detach().cpu(), zeros, ones, n_classes)


def _count_classes(labels: Tensor, name: str, n_classes: int | None) -> int:
    """How many classes labels (n,) have, at least `n_classes`; 0 for targets that are no labels."""
    if n_classes == 0 or labels.dim() != 1 or labels.is_floating_point():
        return 0
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise UserError(f"The labels of {name} are {labels.dtype} from {low}; expected integers from 0.")
    if n_classes and high >= n_classes:
        raise UserError(f"The labels of {name} must lie in 0..{n_classes - 1}, got {high}.")
    return n_classes or high + 1


class DatasetImages:
    """Any map-style dataset of (image, target): images are floating (C, ...), tensors or arrays; targets see below.

    Where the first target is a single integer, and `n_classes` is not 0, targets are labels; else they are numbers or
    arrays of one shape, or boxes, padded to those of the image that has most. Items may be mappings (`image`,
    `label`), and may hold more behind image and label. Labels that the dataset lists (`targets`) are taken where they
    are those of its items, else every item is read once; without `n_classes` there are as many classes as labels need.
    Raises UserError for items of another form.
    """

    def __init__(
        self,
        dataset: Any,
        n_classes: int | None = None,
        indices: Tensor | None = None,
        box_room: int | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._dataset = dataset
        self._workers = workers or Workers()
        self.box_room = box_room
        self.packing: Packing | None = None
        self._indices = torch.arange(len(dataset)) if indices is None else indices
        if len(self._indices) == 0:
            raise UserError("The dataset is empty; give at least one image.")
        if box_room is None and holds_boxes(pair_of(read_item(dataset, int(self._indices[0])))[1]):
            self.box_room = self._most_boxes()
        image, first = self._item(0)
        self.image_shape: tuple[int, ...] = tuple(image.shape)
        self._labels: Tensor | None = None
        self._digest: str | None = None
        whole = not first.is_floating_point() or bool(n_classes)  # a number of classes means labels
        self._classified = n_classes != 0 and first.numel() == 1 and whole
        self._shape = () if self._classified else tuple(first.shape)
        self.n_classes = n_classes or 0 if self._classified else 0
        if self._classified and not n_classes:
            self.n_classes = max(1, int(self.labels.max()) + 1)

    def _item(self, position: int) -> tuple[Tensor, Tensor]:
        image, target = pair_of(read_item(self._dataset, int(self._indices[position])))
        if self.box_room is None:
            return self._input(image), target_of(target)
        return self._input(image), padded(self._boxes(target), self.box_room)

    def _input(self, value: Any) -> Tensor:
        """An image, or several inputs in one tensor (`Packing`)."""
        if self.packing is None and is_several(value):
            self.packing = Packing.of(value)
        return image_of(value) if self.packing is None else self.packing.pack(value)

    def _most_boxes(self) -> int:
        """Boxes of the image that has most; twice as many where they are not the same when they are read again."""
        with randomness_restored():
            targets = (pair_of(read_item(self._dataset, int(index)))[1] for index in self._indices)
            most = max(len(self._boxes(target)) for target in targets)
            self.box_room = 2 * max(1, most)
            return max(1, most) if self._repeats_itself() else self.box_room

    def _boxes(self, target: Any) -> Tensor:
        if not holds_boxes(target):
            raise UserError(f"A dataset's first target held boxes, another one is {shown(target)}; expected boxes.")
        return as_boxes(target)

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Of one target; () of labels."""
        return self._shape if self.box_room is None else (self.box_room, 5)

    @property
    def labels(self) -> Tensor:
        """All labels, int64 (len,), or targets (len, ...); labels are read once."""
        if not self._classified:
            return self._stacked([self._item(position)[1] for position in range(len(self))])
        if self._labels is None:
            with randomness_restored():
                self._labels = self._listed_labels()
                if self._labels is None:
                    jobs = torch.arange(len(self)).split(PROBES)
                    read = read_ahead(self._read_labels, jobs, self._workers, torch.empty(1), 4 * PROBES)
                    self._labels = torch.cat([labels for _, labels in read])
        return self._labels

    def read_by(self, workers: int) -> Self:
        """The same images, read by so many processes; 0: by this one."""
        readers = replace(self._workers, count=Workers.chosen(None, workers).count)
        chosen = type(self)(self._dataset, self.n_classes, self._indices, self.box_room, readers)
        chosen._labels = self._labels
        chosen.check_randomness()
        return chosen

    def check_randomness(self) -> None:
        """Find out where random numbers of the items come from, before workers read them.

        A generator that the data set holds would be copied into every worker and start anew in every epoch: such a data
        set is read in this process, which a `Notice` says, unless a `worker_init_fn` takes care of it.
        """
        if not self._workers.usable:
            return
        with randomness_restored():
            before = random_states()
            repeats = self._repeats_itself()
            draws = random_states() != before
        self._workers = replace(self._workers, seeded=draws)
        if not (repeats or draws or self._workers.ready):
            self._workers = Workers()
            warnings.warn(
                "A data set draws random numbers from a generator of its own, of which every worker would hold a copy; "
                "it is read in this process: draw from torch, numpy.random or random for workers, or give a DataLoader "
                "with a worker_init_fn.",
                Notice,
                stacklevel=4,
            )

    def _read_labels(self, indices: Tensor, seed: int, place: Tensor) -> Tensor:
        """The labels alone, as a worker reads them."""
        return torch.tensor([self._label(each) for each in indices.tolist()])

    def _label(self, position: int) -> int:
        return label_of(pair_of(read_item(self._dataset, int(self._indices[position])))[1])

    def _listed_labels(self) -> Tensor | None:
        """Labels that the dataset lists, (len,), where an even sample of its items has the same ones; else None."""
        listed = listed_labels(self._dataset)
        if listed is None or len(listed) != len(self._dataset):
            return None
        chosen = listed[self._indices]
        return chosen if all(self._label(each) == int(chosen[each]) for each in evenly(len(self), PROBES)) else None

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Indices int64 (B,) -> images float32 (B, C, ...) and labels int64 (B,), or targets (B, ...).

        UserError for NaN, bad labels and targets that differ in shape.
        """
        if self._workers.usable and len(indices) > job_size(4 * math.prod(self.image_shape)):
            return next(self.batches([indices]))
        return self._checked([self._item(int(index)) for index in indices])

    def batches(self, parts: Sequence[Tensor], pinned: bool = False) -> Generator[tuple[Tensor, Tensor], None, None]:
        """The batch of each of `parts`, in their order; by the workers, if there are any, ahead of its turn."""
        if self._workers.usable and len(parts) > 0:
            yield from in_batches(self._read, parts, self._workers, torch.empty(self.image_shape), pinned)
        else:
            yield from map(self.batch, parts)

    def _read(self, indices: Tensor, seed: int, place: Tensor) -> Tensor:
        """A batch as a worker reads it: where the data set draws at random, every item from a seed of its own."""
        items = []
        for index in indices.tolist():
            seeded = self._workers.seeded
            with randomness_restored(item_seed(seed, int(self._indices[index]))) if seeded else nullcontext():
                items.append(self._item(index))
        images, targets = self._checked(items)
        place.copy_(images)
        return targets

    def _checked(self, items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        shapes = {tuple(image.shape) for image, _ in items}
        if shapes != {self.image_shape}:
            raise UserError(f"Dataset images differ in shape: {sorted(shapes)}, the first was {self.image_shape}.")
        images = torch.stack([image.to(torch.float32) for image, _ in items])
        if not torch.isfinite(images).all():
            raise UserError("The dataset gave images with NaN or infinite values; fix or remove them.")
        if not self._classified:
            return images, self._stacked([target for _, target in items])
        labels = torch.tensor([label_of(target) for _, target in items])
        if labels.min() < 0 or labels.max() >= self.n_classes:
            raise UserError(
                f"Dataset labels must lie in 0..{self.n_classes - 1}, got {int(labels.min())}..{int(labels.max())}."
            )
        return images, labels

    def _stacked(self, targets: Sequence[Tensor]) -> Tensor:
        shapes = {tuple(each.shape) for each in targets}
        if shapes != {self.target_shape}:
            raise UserError(
                f"Dataset targets differ in shape: {sorted(shapes)}, the first was {self.target_shape}; give all of "
                "them one shape."
            )
        stacked = as_targets(torch.stack(list(targets)))
        if not torch.isfinite(stacked).all():
            raise UserError("The dataset gave targets with NaN or infinite values; fix or remove them.")
        return stacked

    def select(self, indices: Tensor) -> Self:
        """Only the images at `indices` int64, in that order (a view)."""
        selected = type(self)(self._dataset, self.n_classes, self._indices[indices], self.box_room, self._workers)
        selected._labels = None if self._labels is None else self._labels[indices]
        return selected

    def digest(self) -> str:
        """sha256 over all labels or targets and the pixels of 512 images, evenly spread; without the pixels of a
        dataset that augments, which differ from one reading to the next.
        """
        if self._digest is None:
            with randomness_restored():
                self._digest = self._computed_digest()
        return self._digest

    def _computed_digest(self) -> str:
        digest = hashlib.sha256()
        if self._classified:
            digest.update(self.labels.numpy().tobytes())
        else:
            for position in range(len(self)):  # one by one: maps of all images may not fit into memory
                digest.update(self._item(position)[1].contiguous().numpy().tobytes())
        if self._repeats_itself():
            for images, _ in self.batches(torch.tensor(evenly(len(self), HASHED_ITEMS)).split(64)):
                digest.update(images.numpy().tobytes())
        return digest.hexdigest()

    def _repeats_itself(self) -> bool:
        """Whether images are the same when they are read again: no random augmentation."""
        some = evenly(len(self), 4)
        return all(torch.equal(self._item(each)[0], self._item(each)[0]) for each in some)


_OURS = (ArrayImages, DatasetImages)
