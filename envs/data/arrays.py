"""Arrays that come from outside: read without unpickling, and checked before anything trusts them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError

Arrays = Mapping[str, np.ndarray]
KEYS = ("x_train", "y_train", "x_test", "y_test")
MAX_COPIES = 0.01  # fraction of test images that may also be training images; CIFAR-10 itself is far below


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


def checked_images(array: np.ndarray, key: str, name: str) -> Tensor:
    """An image array as a tensor (n, C, H, W), uint8 or float32; UserError for any other shape, type or NaN."""
    form = "uint8 (n, height, width, channels) or floating (n, channels, height, width)"
    is_bytes = array.dtype == np.uint8
    if not is_bytes and array.dtype.kind != "f":
        raise UserError(f"'{name}': {key} has type {array.dtype}; expected {form}.")
    if array.ndim != 4 or 0 in array.shape:
        raise UserError(f"'{name}': {key} has shape {array.shape}; expected {form}, none of them 0.")
    channels, sides = (array.shape[3], array.shape[1:3]) if is_bytes else (array.shape[1], array.shape[2:])
    if channels > min(sides):
        raise UserError(
            f"'{name}': {key} is {array.dtype} of shape {array.shape}, which reads as {channels} channels of "
            f"{sides[0]}x{sides[1]} pixels; expected {form}."
        )
    if is_bytes:
        return torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2)
    broken = int((~np.isfinite(array).all(axis=(1, 2, 3))).sum())
    if broken:
        raise UserError(f"'{name}': {key} has NaN or infinite values in {broken} of {len(array)} images; remove them.")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def checked_labels(array: np.ndarray, key: str, n_images: int, n_classes: int, name: str) -> Tensor:
    """A label array as int64 (n,); UserError for another shape or type, or labels outside [0, n_classes)."""
    if array.dtype.kind not in "iu":
        raise UserError(f"'{name}': {key} has type {array.dtype}; expected integer labels 0..{n_classes - 1}.")
    if array.shape != (n_images,):
        raise UserError(f"'{name}': {key} has shape {array.shape}; expected ({n_images},), one label an image.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= n_classes:
        raise UserError(
            f"'{name}': {key} has labels {low}..{high}; expected 0..{n_classes - 1} for {n_classes} classes, "
            "numbered from 0 without gaps."
        )
    return torch.from_numpy(array.astype(np.int64))


def holds_labels(array: np.ndarray) -> bool:
    """Whether an array of targets is one integer an image, a label; anything else is for other measures than top-1."""
    return array.ndim == 1 and array.dtype.kind in "iu"


def checked_targets(array: np.ndarray, key: str, n_images: int, name: str) -> Tensor:
    """An array of targets that are no labels, (n, ...), in its own type; UserError for other types, lengths and NaN."""
    if array.dtype.kind not in "iufb":
        raise UserError(f"'{name}': {key} has type {array.dtype}; expected numbers.")
    if array.ndim == 0 or len(array) != n_images:
        raise UserError(f"'{name}': {key} has shape {array.shape}; expected {n_images} targets, one an image.")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise UserError(f"'{name}': {key} has NaN or infinite values; mend or remove them.")
        array = array.astype(np.float32)
    # torch has no arithmetic for the wider unsigned types.
    kept = array if array.dtype.kind == "f" or array.dtype == np.uint8 else array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(kept))


def refuse_copies(x_train: np.ndarray, x_test: np.ndarray, name: str) -> None:
    """UserError where more than 1 % of the test images are training images too, byte for byte."""
    seen = {_fingerprint(image) for image in x_train}
    copies = [index for index, image in enumerate(x_test) if _fingerprint(image) in seen]
    if len(copies) > MAX_COPIES * len(x_test):
        raise UserError(
            f"'{name}': {len(copies)} of {len(x_test)} test images are training images too (first: {copies[0]}); "
            "the splits overlap, so no accuracy on them would mean anything."
        )


def _fingerprint(image: np.ndarray) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()
