"""Folders of image files by class, decoded when they are asked for: by workers, ahead of their turn, and cached.

Shapes: B images of a batch, S their side, C channels.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...ranges import NOT_NEGATIVE, SEED, check_given, check_number
from .decoding import SUFFIXES, Decoder, check_file
from .image_cache import Budget, ImageCache
from .images import LabelledData
from .items import evenly
from .read_ahead import MOST_WORKERS, Buffers, Workers, job_size, read_ahead

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std that most trained networks take
TESTS = ("test", "val", "valid", "validation")
MOST_WORKERS_UNASKED = 8
FEW = 256  # images that are decoded sooner than workers start
HASHED = 512  # images whose pixels go into the digest
MOST_CHECKED = 50_000  # files whose beginning and end are looked at before anything else
LARGEST = 1e6  # of a mean or std
ARCHIVERS = "__MACOSX"  # what archives of some systems hold beside their files
CHUNK_BYTES = 2**18  # of pixels that are normalised at a time, in a processor's cache


def from_folder(
    path: str | os.PathLike[str],
    size: int = 224,
    mean: float | Sequence[float] = IMAGENET[0],
    std: float | Sequence[float] = IMAGENET[1],
    resize: int | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    workers: int | None = None,
    cache_gib: float = 1.0,
) -> LabelledData:
    """Images in `path/train/CLASS/*` and `path/test/CLASS/*` (or `val`); `keepdrop.from_folder`.

    Classes are numbered in the order of their names; hidden folders and files are left out. Files are JPEG, PNG, BMP,
    GIF, PPM, WebP or TIFF, and read by Pillow (extra `vision`) when they are needed.

    Args:
        path: the folder.
        size: side of the square in the centre that is taken, in pixels.
        mean, std: one number per channel, of pixels in [0, 1]; those of ImageNet. Single numbers make images grey.
        resize: the short side before that, e.g. 256; None: `size`.
        test_fraction: of the images of each class that are test images, for a folder without test images of its own:
            `path/CLASS/*`, or `path/train/CLASS/*`. None: `path` holds both.
        seed: draws them.
        workers: processes that decode; 0: this one. None: one per core, at most 8, for 256 images or more; only on
            Linux, as they need a guarded script elsewhere.
        cache_gib: memory in GiB for decoded images, uint8, of training and test images together: 7,133 of size 224 in
            1 GiB. The others are decoded again whenever they are read.

    Raises:
        UserError: a folder, classes or images are missing, differ between train and test, or are of one class only; a
            file among the first 50,000 is damaged; Pillow is missing.
    """
    check_number("workers", [workers], MOST_WORKERS)
    check_given("cache_gib", cache_gib, NOT_NEGATIVE)
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"The path of an image folder is {path!r}; expected a text.")
    mean, std = _per_channel("mean", mean), _per_channel("std", std)
    if len(mean) != len(std) or min(std, default=0) <= 0:
        raise UserError(f"Expected one mean and one positive std per channel, got mean={list(mean)}, std={list(std)}.")
    decoder = Decoder(size, resize, len(mean))
    listed = _both(Path(path).expanduser(), test_fraction, seed)
    for files in listed:
        files.check(decoder)
    budget = Budget(int(cache_gib * 2**30))
    train, test = (
        FolderImages(files, decoder, mean, std, workers, ImageCache(len(files.paths), budget)) for files in listed
    )
    return LabelledData(train, test)


def _per_channel(name: str, values: float | Sequence[float]) -> tuple[float, ...]:
    """Numbers of channels as a tuple; UserError for what is no finite number. One alone is that of the only channel."""
    found = tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else (values,)
    for each in found:
        check_given(f"A number of {name}", each, (-LARGEST, LARGEST))
    return found


def image_folder(root: str, size: int, mean: Sequence[float], std: Sequence[float]) -> LabelledData:
    """`from_folder` as it was called before."""
    return from_folder(root, size, mean, std)


@dataclass(frozen=True)
class Files:
    """Image files and their labels, int64 (n,), in [0, len(classes))."""

    paths: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]

    @classmethod
    def under(cls, folder: Path) -> Files:
        """Those in `folder/CLASS`, and in folders there, sorted; symbolic links to folders of images are not followed.

        UserError where there are none.
        """
        classes = _folders(folder)
        found = [list(_images(folder / name)) for name in classes]
        if not any(found):
            raise UserError(f"The image folder '{folder}' holds no images in class sub-folders.")
        counts = torch.tensor([len(each) for each in found])
        paths = tuple(path for each in found for path in each)
        return cls(paths, torch.arange(len(classes)).repeat_interleave(counts), tuple(classes))

    def at(self, places: np.ndarray) -> Files:
        """Some of them."""
        return Files(tuple(self.paths[each] for each in places), self.labels[torch.from_numpy(places)], self.classes)

    def divided(self, test_fraction: float, seed: int) -> tuple[Files, Files]:
        """Those to train on, and of each class a fraction as test images, one at least where there are two."""
        generator, chosen = np.random.default_rng(seed), np.zeros(len(self.paths), dtype=bool)
        for label in range(len(self.classes)):
            places = np.flatnonzero(self.labels.numpy() == label)
            count = max(round(test_fraction * len(places)), 1) if len(places) > 1 else 0
            chosen[generator.permutation(places)[: min(count, len(places) - 1)]] = True
        return self.at(np.flatnonzero(~chosen)), self.at(np.flatnonzero(chosen))

    def check(self, decoder: Decoder) -> None:
        """UserError that names a file which is no image, or was cut off, and counts others like it."""
        bad: list[tuple[str, UserError]] = []
        for place in evenly(len(self.paths), MOST_CHECKED):
            try:
                check_file(self.paths[place], decoder)
            except UserError as error:
                bad.append((self.paths[place], error))
        if len(bad) == 1:
            raise bad[0][1]
        if bad:
            others = ", ".join(path for path, _ in bad[1:4]) + (", ..." if len(bad) > 4 else "")
            raise UserError(f"{str(bad[0][1])[:-1]}, and {len(bad) - 1} more: {others}.")


def _folders(folder: Path) -> list[str]:
    names = (each.name for each in folder.iterdir() if each.is_dir())
    return sorted(name for name in names if not name.startswith(".") and name != ARCHIVERS)


def _images(folder: Path) -> Iterator[str]:
    for where, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.rpartition(".")[2].lower() in SUFFIXES:
                yield f"{where}{os.sep}{name}"


def _both(base: Path, test_fraction: float | None, seed: int) -> tuple[Files, Files]:
    """The files to train on and those to test on; UserError where it is not clear which are which."""
    if not base.is_dir():
        raise UserError(f"There is no image folder '{base}'; expected train/CLASS/* and test/CLASS/* (or val) in it.")
    train = base / "train"
    tests = [base / name for name in TESTS if (base / name).is_dir() and _folders(base / name)]
    if train.is_dir():  # a folder of images without labels lies beside it at times
        tests.sort(key=lambda each: _folders(each) != _folders(train))
    test = tests[0] if tests else None
    if test_fraction is None:
        if not train.is_dir() or test is None:
            raise _undivided(base)
        files = Files.under(train), Files.under(test)
    else:
        check_given("seed", seed, SEED)
        if not (isinstance(test_fraction, Real) and 0 < test_fraction < 1):
            raise UserError(f"test_fraction must lie between 0 and 1, got {test_fraction}.")
        if train.is_dir() and test is not None:
            raise UserError(f"'{base}' holds test images in '{test.name}' already; leave test_fraction out.")
        files = Files.under(train if train.is_dir() else base).divided(test_fraction, seed)
    _check_classes(base, *files, "test" if test is None else test.name)
    return files


def _undivided(base: Path) -> UserError:
    found = sorted(each.name for each in base.iterdir() if not each.name.startswith("."))
    names = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
    return UserError(
        f"The image folder '{base}' holds {names or 'nothing'}; expected train/CLASS/* and test/CLASS/* (or val) in "
        "it. To divide one folder of classes, say which part the test images are:",
        python="test_fraction=0.2.",
        typed="data.test_fraction=0.2.",
    )


def _check_classes(base: Path, train: Files, test: Files, name: str) -> None:
    odd = [f"{each} (only in train)" for each in train.classes if each not in test.classes]
    odd += [f"{each} (only in {name})" for each in test.classes if each not in train.classes]
    if odd:
        raise UserError(
            f"Train and test folders under '{base}' differ in their classes: {', '.join(odd[:5])}; give both the same "
            "folders, of which those to test on may be empty."
        )
    if len(train.classes) == 1:
        raise UserError(
            f"The image folder '{base}' holds a single class, {train.classes[0]}; expected two or more to tell apart."
        )
    counts = train.labels.bincount(minlength=len(train.classes)).tolist()
    empty = [each for each, count in zip(train.classes, counts, strict=True) if count == 0]
    if empty:
        raise UserError(f"There are no images to train on of {', '.join(empty[:5])} under '{base}'; add or remove it.")


class FolderImages:
    """Image files behind the interface of `LabelledImages`; batches lie channels-last in memory.

    Decoded images, uint8, are kept in `cache`, and files that are not there are decoded by `workers` processes.
    """

    packing = None
    target_shape = ()

    def __init__(
        self,
        files: Files,
        decoder: Decoder,
        mean: Sequence[float],
        std: Sequence[float],
        workers: int | None,
        cache: ImageCache,
        indices: Tensor | None = None,
    ) -> None:
        self.files, self.decoder, self.mean, self.std, self.workers = files, decoder, tuple(mean), tuple(std), workers
        self.cache = cache
        self._indices = torch.arange(len(files.paths)) if indices is None else indices
        self._digest: str | None = None
        # One number for every value of a row of pixels: a processor takes these at a time, and three it does not.
        self._shift = torch.tensor(self.mean).repeat(decoder.size)
        self._scale = torch.tensor(self.std).repeat(decoder.size)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, S, S)."""
        return self.decoder.channels, self.decoder.size, self.decoder.size

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of their labels."""
        return self.files.classes

    @property
    def n_classes(self) -> int:
        """Labels lie in [0, n_classes)."""
        return len(self.files.classes)

    @property
    def labels(self) -> Tensor:
        """All labels, int64 (len,)."""
        return self.files.labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Indices int64 (B,) -> images float32 (B, C, S, S), normalised, and labels int64 (B,)."""
        with closing(self.batches([indices])) as batches:
            return next(batches)

    def batches(self, parts: Sequence[Tensor], pinned: bool = False) -> Generator[tuple[Tensor, Tensor], None, None]:
        """The batch of each of `parts`, in their order; what is not cached is decoded by the workers meanwhile."""
        wanted = [self._indices[part] for part in parts]
        cached = [self.cache.holds(each) for each in wanted]
        workers = self._workers(sum(int((~each).sum()) for each in cached))
        like = torch.empty(self.decoder.shape, dtype=torch.uint8)
        size, buffers = job_size(like.numel()), Buffers(pinned)
        jobs = [each[~there].split(size) if not there.all() else () for each, there in zip(wanted, cached, strict=True)]
        ahead = 2 * max(map(len, wanted), default=0)
        stream = read_ahead(self._decode, [job for each in jobs for job in each], workers, like, ahead)
        with closing(stream):
            for indices, there, each in zip(wanted, cached, jobs, strict=True):
                images = buffers.empty((len(indices), *self.decoder.shape))
                places = (~there).nonzero()[:, 0].split(size)
                for job, rows in zip(each, places, strict=False):
                    pixels, _ = next(stream)
                    self._normalise(pixels, images, rows)
                    self.cache.keep(job, pixels)
                for rows in there.nonzero()[:, 0].split(self._at_once) if there.any() else ():
                    kept = torch.stack([self.cache.image(index) for index in indices[rows].tolist()])
                    self._normalise(kept, images, rows)
                yield images.permute(0, 3, 1, 2), self.files.labels[indices]

    def _workers(self, n_missing: int) -> Workers:
        """Those that were asked for, or as many as there are cores, where workers start in no time."""
        if self.workers is not None or n_missing < FEW or sys.platform != "linux":
            return Workers(self.workers or 0)
        return Workers(min(MOST_WORKERS_UNASKED, len(os.sched_getaffinity(0))))

    def _decode(self, indices: Tensor, seed: int, place: Tensor) -> Tensor:
        """Pixels of files go to their place, uint8 (B, S, S, C); returns nothing that is used."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd metadata and large images
            for pixels, index in zip(place.numpy(), indices.tolist(), strict=True):
                pixels[...] = self.decoder(self.files.paths[index])
        return torch.empty(0)

    @property
    def _at_once(self) -> int:
        """Images that are normalised together: as many as a processor's cache holds."""
        return max(1, CHUNK_BYTES // math.prod(self.decoder.shape))

    def _normalise(self, pixels: Tensor, images: Tensor, rows: Tensor) -> None:
        """Pixels uint8 (n, S, S, C) -> `images` float32 (B, S, S, C), at ascending rows int64 (n,)."""
        for some, places in zip(pixels.split(self._at_once), rows.split(self._at_once), strict=True):
            first, last = int(places[0]), int(places[-1]) + 1
            side_by_side = last - first == len(places)
            target = images[first:last] if side_by_side else torch.empty(some.shape)
            flat = target.view(-1, len(self._shift))
            torch.div(some.reshape(flat.shape), 255, out=flat)
            flat.sub_(self._shift).div_(self._scale)
            if not side_by_side:
                images[places] = target

    def select(self, indices: Tensor) -> FolderImages:
        """Only the images at `indices` int64, in that order (a view with the same cache)."""
        chosen = self._indices[indices]
        return FolderImages(self.files, self.decoder, self.mean, self.std, self.workers, self.cache, chosen)

    def read_by(self, workers: int) -> FolderImages:
        """The same images, decoded by so many processes; 0: by this one."""
        check_number("workers", workers, MOST_WORKERS)
        return FolderImages(self.files, self.decoder, self.mean, self.std, workers, self.cache, self._indices)

    def resident(self) -> FolderImages:
        """The same images, decoded once and kept, outside the budget: uint8, len * S * S * C bytes."""
        files = self.files.at(self._indices.numpy())
        cache = ImageCache(len(files.paths), Budget(len(files.paths) * math.prod(self.decoder.shape)))
        kept = FolderImages(files, self.decoder, self.mean, self.std, self.workers, cache)
        for _ in kept.batches(torch.arange(len(kept)).split(FEW)):
            pass
        return kept

    def digest(self) -> str:
        """sha256 over all labels and the pixels of 512 images, evenly spread."""
        if self._digest is None:
            digest = hashlib.sha256(self.labels.numpy().tobytes())
            for images, _ in self.batches(torch.tensor(evenly(len(self), HASHED)).split(64)):
                digest.update(images.contiguous().numpy().tobytes())
            self._digest = digest.hexdigest()
        return self._digest
