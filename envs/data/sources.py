"""Where labelled images come from: digits, an .npz of arrays, torchvision datasets, image folders.

What the user has in Python goes through `datasets.from_datasets`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .arrays import from_arrays, read_npz
from .datasets import DatasetImages, from_datasets
from .images import ArrayImages, LabelledData, LabelledImages

__all__ = [
    "ArrayImages",
    "DatasetImages",
    "LabelledData",
    "LabelledImages",
    "digits",
    "from_datasets",
    "image_folder",
    "npz",
    "torchvision_dataset",
]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff"})


def digits(seed: int = 0, test_fraction: float = 0.25) -> LabelledData:
    """The 1,797 handwritten digits of scikit-learn, (1, 8, 8), pixels 0..16 normalised to mean 0 and std 1, shuffled.

    They are part of the package (digits.npz; source and license in digits.txt). `test_fraction` in (0, 1) of them are
    the test images. Raises UserError for another fraction.
    """
    if not 0 < test_fraction < 1:
        raise UserError(f"test_fraction must lie between 0 and 1, got {test_fraction}.")
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        images = torch.from_numpy(file["images"])[:, None]
        labels = torch.from_numpy(file["labels"].astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    n_test = max(1, round(test_fraction * len(labels)))
    # 16 is white; mean and std are those of all digits.
    source = ArrayImages(images, labels, mean=(0.3053,), std=(0.3761,), n_classes=10, scale=1 / 16)
    return LabelledData(train=source.select(order[n_test:]), test=source.select(order[:n_test]))


def npz(
    path: str | os.PathLike[str],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    n_classes: int | None = None,
) -> LabelledData:
    """Arrays `x_train, y_train, x_test, y_test` of an .npz file.

    Images are uint8 (n, height, width, channels), scaled to [0, 1], or floating (n, channels, height, width), taken as
    they are; then normalised with `mean` and `std` per channel (default: those of the training images). Signals are
    floating (n, channels, length), volumes and videos have one side more than images. Labels are integers (n,) or
    (n, 1) in [0, n_classes); `n_classes` defaults to the number of labels in y_train. Anything else, (n, ...),
    and with `n_classes` 0 integers too, are targets for another metric than top-1. Nothing is unpickled.

    Raises UserError for a missing, damaged or pickled file, missing arrays, wrong shapes or types, NaN and labels out
    of range.
    """
    return from_arrays(read_npz(Path(path)), mean, std, n_classes, name=str(path))


def torchvision_dataset(
    name: str, root: str, mean: Sequence[float], std: Sequence[float], download: bool = False, **kwargs: Any
) -> LabelledData:
    """A classification dataset of torchvision that takes `train=True/False`: CIFAR10, CIFAR100, MNIST, FashionMNIST...

    Needs the extra `vision`. Raises UserError when torchvision does not import, has no such dataset, or when the files
    are not under `root` and `download` is off.
    """
    datasets = _torchvision_datasets()
    kind = getattr(datasets, name, None)
    if not callable(kind):
        raise UserError(f"torchvision has no dataset '{name}'; known are for example CIFAR10, CIFAR100 and MNIST.")
    try:
        parts = {part: kind(root, train=part == "train", download=download, **kwargs) for part in ("train", "test")}
    except (RuntimeError, OSError, TypeError) as error:
        raise UserError(f"torchvision could not read {name} from '{root}' ({error}); try download=true.") from error
    arrays: dict[str, np.ndarray] = {}
    for part, dataset in parts.items():
        pixels = np.asarray(dataset.data)
        arrays[f"x_{part}"] = pixels[..., None] if pixels.ndim == 3 else pixels
        arrays[f"y_{part}"] = np.asarray(dataset.targets)
    return from_arrays(arrays, mean, std, name=name)


def image_folder(root: str, size: int, mean: Sequence[float], std: Sequence[float]) -> LabelledData:
    """Images in `root/train/CLASS/*` and `root/test/CLASS/*` (or `val`): short side to `size`, centre `size` x `size`.

    Images are read when needed, in RGB, scaled to [0, 1] and normalised; 16 bits of grey are scaled to 8 first. Needs
    the extra `vision` (only Pillow of it). Raises UserError for a missing folder, no images, classes that differ
    between train and test, and images of floating or 32-bit values, whose white nobody knows.
    """
    base = Path(root)
    test = next((base / name for name in ("test", "val") if (base / name).is_dir()), base / "test")
    transform = _centre_crop(size, mean, std)
    ours, theirs = ImageFolder(base / "train", transform), ImageFolder(test, transform)
    if ours.classes != theirs.classes:
        odd = sorted(set(ours.classes) ^ set(theirs.classes))
        raise UserError(f"Train and test folders under '{root}' differ in their classes: {', '.join(odd[:5])}.")
    return from_datasets(ours, theirs, len(ours.classes))


class ImageFolder:
    """A map-style dataset over `folder/CLASS/image files`; classes are numbered in alphabetical order."""

    def __init__(self, folder: Path, transform: Callable[[Any], Tensor]) -> None:
        if not folder.is_dir():
            raise UserError(f"There is no image folder '{folder}'; expected one sub-folder per class in it.")
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not self.files:
            raise UserError(f"The image folder '{folder}' holds no images in class sub-folders.")
        self.targets = [label for _, label in self.files]
        self._transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, UnidentifiedImageError

        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                return self._transform(_rgb(image, path)), label
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"'{path}' is not a readable image; fix or remove it.") from error


def _rgb(image: Any, path: Path) -> Any:
    """A Pillow image in RGB. Pillow itself would clip grey of 16 bits at 255: nearly all of it white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        from PIL import Image

        values = np.asarray(image)
        # Files of 16 bits open as "I;16", with older versions of Pillow as "I".
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UserError(
                f"'{path}' holds {'floating' if image.mode == 'F' else '32-bit'} values from {values.min()} to "
                f"{values.max()}, whose white is unknown; save it with 8 or 16 bits per channel."
            )
        image = Image.fromarray((values.astype(np.float64) / 257).round().astype(np.uint8))
    # A palette with transparency goes through RGBA, as Pillow asks for.
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def _centre_crop(size: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Any], Tensor]:
    try:
        from PIL import ImageOps
    except ImportError as error:
        raise UserError("Image folders need Pillow; install it with: pip install 'keepdrop[vision]'.") from error
    shift, scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def transform(image: Any) -> Tensor:
        pixels = torch.from_numpy(np.array(ImageOps.fit(image, (size, size)))).permute(2, 0, 1)
        return (pixels / 255 - shift) / scale

    return transform


def _torchvision_datasets() -> Any:
    try:
        from torchvision import datasets
    # A torchvision built for another torch fails with a RuntimeError while it registers its operators.
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"torchvision does not import ({reason}); install it with: pip install 'keepdrop[vision]', "
            "from the same index as torch."
        ) from error
    return datasets
