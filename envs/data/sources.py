"""Where labelled images come from: digits, an .npz of arrays, torchvision datasets, image folders.

What the user has in Python goes through `datasets.from_datasets`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import UserError
from .arrays import from_arrays, read_npz
from .datasets import DatasetImages, from_datasets
from .image_folder import from_folder, image_folder
from .images import ArrayImages, LabelledData, LabelledImages

__all__ = [
    "ArrayImages",
    "DatasetImages",
    "LabelledData",
    "LabelledImages",
    "digits",
    "from_datasets",
    "from_folder",
    "image_folder",
    "npz",
    "torchvision_dataset",
]


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
