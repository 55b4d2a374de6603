"""Arrays from outside (.npz): read without unpickling, and validated before anything trusts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .images import ArrayImages, LabelledData

Arrays = Mapping[str, np.ndarray]
KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of an .npz file; UserError where the file is missing, damaged, pickled or lacks one."""
    if not path.is_file():
        raise UserError(f"Data file '{path}' does not exist; check the path.")
    try:
        # Opened here, because numpy leaves a damaged file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            missing = [key for key in KEYS if key not in file]
            if not missing:
                return {key: file[key] for key in KEYS}
            found = ", ".join(file) or "nothing"
    # Damaged archives raise BadZipFile, zlib.error, EOFError, ValueError and more; only pickles name themselves.
    except Exception as error:
        if "Object arrays" in str(error):
            raise UserError(
                f"Data file '{path}' holds pickled objects, which are refused; save plain arrays."
            ) from error
        raise UserError(f"Data file '{path}' is truncated or not an .npz file of arrays; write it again.") from error
    raise UserError(f"Data file '{path}' lacks {', '.join(missing)} (it holds {found}); expected {', '.join(KEYS)}.")


def from_arrays(
    arrays: Arrays,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    n_classes: int | None = None,
    name: str = "arrays",
) -> LabelledData:
    """The four arrays as `sources.npz` describes them, already in memory; `name` appears in errors."""
    images = {part: checked_images(arrays[f"x_{part}"], f"x_{part}", name) for part in ("train", "test")}
    n_classes, labels = _targets(arrays, {part: len(each) for part, each in images.items()}, n_classes, name)
    if images["train"].dtype != images["test"].dtype:
        kinds = f"{images['train'].dtype} and {images['test'].dtype}"
        raise UserError(f"'{name}': x_train and x_test must have one type, got {kinds}.")
    if mean is None or std is None:
        found_mean, found_std = _channel_statistics(images["train"])
        mean, std = mean or found_mean, std or found_std
    train, test = (ArrayImages(images[part], labels[part], mean, std, n_classes) for part in ("train", "test"))
    return LabelledData(train, test)


def _targets(
    arrays: Arrays, n_images: Mapping[str, int], n_classes: int | None, name: str
) -> tuple[int, dict[str, Tensor]]:
    """The number of classes and the checked labels of both parts; 0 and the targets where they are not labels."""
    given = {part: arrays[f"y_{part}"] for part in n_images}
    if n_classes != 0:
        given = {part: as_labels(array) for part, array in given.items()}
    if n_classes == 0 or not holds_labels(given["train"]):
        if given["train"].dtype != given["test"].dtype:
            kinds = f"{given['train'].dtype} and {given['test'].dtype}"
            raise UserError(f"'{name}': y_train and y_test must have one type, got {kinds}.")
        return 0, {part: checked_targets(array, f"y_{part}", n_images[part], name) for part, array in given.items()}
    classes = n_classes or len(np.unique(given["train"]))
    return classes, {
        part: checked_labels(array, f"y_{part}", n_images[part], classes, name) for part, array in given.items()
    }


def checked_images(array: np.ndarray, key: str, name: str) -> Tensor:
    """An image array as a tensor (n, C, ...), uint8 or float32; UserError for any other shape, type or NaN.

    Channels come last in uint8, first in floating arrays. Signals (n, C, L) are floating; volumes and videos have one
    side more than images.
    """
    form = "uint8 (n, height, width, channels) or floating (n, channels, height, width)"
    is_bytes = array.dtype == np.uint8
    if not is_bytes and array.dtype.kind != "f":
        raise UserError(f"'{name}': {key} has type {array.dtype}; expected {form}.")
    if array.ndim not in ((4, 5) if is_bytes else (3, 4, 5)) or 0 in array.shape:
        raise UserError(f"'{name}': {key} has shape {array.shape}; expected {form}, all of them above 0.")
    if array.ndim == 4:
        _refuse_other_order(array, is_bytes, f"'{name}': {key} is {array.dtype} of shape {array.shape}", form)
    if is_bytes:
        return torch.from_numpy(np.ascontiguousarray(array)).movedim(-1, 1)
    broken = int((~np.isfinite(array).all(axis=tuple(range(1, array.ndim)))).sum())
    if broken:
        raise UserError(f"'{name}': {key} has NaN or infinite values in {broken} of {len(array)} images; remove them.")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _refuse_other_order(array: np.ndarray, channels_come_last: bool, what: str, form: str) -> None:
    """UserError where one of the sides looks like grey, colour or colour and alpha, and the channels do not.

    More channels than pixels per side are no sign of it: boards of a game, maps of features.
    """
    axes = array.shape[1:]
    channels, sides = (axes[2], axes[:2]) if channels_come_last else (axes[0], axes[1:])
    claimed, other = (sides[0], sides[1]) if channels_come_last else (sides[1], sides[0])
    if claimed in (1, 3, 4) and claimed < min(channels, other):
        raise UserError(f"{what}, which reads as {channels} channels of {sides[0]}x{sides[1]} pixels; expected {form}.")


def checked_labels(array: np.ndarray, key: str, n_images: int, n_classes: int, name: str) -> Tensor:
    """A label array as int64 (n,); UserError for another shape or type, or labels outside [0, n_classes)."""
    if array.dtype.kind not in "iu":
        raise UserError(f"'{name}': {key} has type {array.dtype}; expected integer labels 0..{n_classes - 1}.")
    if array.shape != (n_images,):
        raise UserError(f"'{name}': {key} has shape {array.shape}; expected ({n_images},), one label per image.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= n_classes:
        raise UserError(
            f"'{name}': {key} has labels {low}..{high}; expected 0..{n_classes - 1} for {n_classes} classes, "
            "numbered from 0 without gaps."
        )
    return torch.from_numpy(array.astype(np.int64))


def holds_labels(array: np.ndarray) -> bool:
    """Whether an array of targets is one integer per image, a label; anything else is for other metrics than top-1."""
    return array.ndim == 1 and array.dtype.kind in "iu"


def as_labels(array: np.ndarray) -> np.ndarray:
    """Integers (n, 1) as (n,): a column of labels; other arrays as they are."""
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 and array.dtype.kind in "iu" else array


def checked_targets(array: np.ndarray, key: str, n_images: int, name: str) -> Tensor:
    """An array of targets other than labels, (n, ...), in its own type; UserError for other types, lengths and NaN."""
    if array.dtype.kind not in "iufb":
        raise UserError(f"'{name}': {key} has type {array.dtype}; expected numbers.")
    if array.ndim == 0 or len(array) != n_images:
        raise UserError(f"'{name}': {key} has shape {array.shape}; expected {n_images} targets, one per image.")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise UserError(f"'{name}': {key} has NaN or infinite values; fix or remove them.")
        array = array.astype(np.float32)
    # torch has no arithmetic for the wider unsigned types.
    kept = array if array.dtype.kind == "f" or array.dtype == np.uint8 else array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(kept))


def _channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and std per channel of (n, C, H, W), of uint8 after scaling to [0, 1]."""
    scale = 1.0 if images.is_floating_point() else 1 / 255
    mean, std = [], []
    for channel in images.unbind(1):
        values = channel.to(torch.float32) * scale
        mean.append(float(values.mean()))
        std.append(float(values.std().clamp_min(1e-6)))
    return mean, std
