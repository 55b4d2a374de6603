"""Batch size: how many images go through a network at once, and which number is the fastest.

Shapes: B images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# The first one is taken unless another is clearly better.
BATCHES = {"cpu": (128, 64, 256, 512), "cuda": (1024, 4096, 16384)}
IN_CACHE_BYTES = 2**20  # of images that a processor takes together, so that what layers make of them stays in its cache
SMALL_IMAGE = 3 * 64 * 64  # numbers of an image
CALIBRATION_SECONDS = {"cpu": 0.4, "cuda": 0.1}


def default_batch(device: torch.device) -> int:
    """Images per pass where nothing was measured."""
    return BATCHES[_kind(device)][0]


def cached_batch(images: Tensor) -> int:
    """Images per pass of a network that runs once, where nothing is measured; any batch gives the same answers."""
    if images.device.type != "cpu" or len(images) == 0:
        return 256
    return max(16, min(256, IN_CACHE_BYTES // max(1, images[0].numel() * images.element_size()) // 16 * 16))


def gradient_batch(images: Tensor, most: int) -> int:
    """Images per pass where all layers' values stay in memory, for gradients: `most` up to 64 x 64 pixels of 3 colours.

    Of larger ones as many as have as many numbers, so that ResNet-50 at 224 pixels takes a few GiB and not dozens.
    """
    size = images[0].numel() if len(images) else 1
    return most if size <= SMALL_IMAGE else max(2, most * SMALL_IMAGE // size)


def _kind(device: torch.device) -> str:
    """The kind of device whose settings apply."""
    return device.type if device.type in BATCHES else "cpu"


def chunks(count: int, batch: int) -> Iterator[slice]:
    """Slices of about `batch` images, never of a single one."""
    start = 0
    while start < count:
        end = min(start + max(2, batch), count)
        if count - end == 1:
            end += 1 if end - start < 3 else -1
        yield slice(start, end)
        start = end


def fastest_batch(run: Callable[[tuple[Tensor, ...]], Any], values: tuple[Tensor, ...]) -> int:
    """The batch of B rows of `values` with the least time per row; the default one unless another is clearly better.

    A GPU gets more rows than there are, by repeating them: there masks share a batch.
    """
    device, total = values[0].device, len(values[0])
    default, candidates = default_batch(device), BATCHES[_kind(device)]
    if total < 256:
        return default
    if device.type != "cuda":
        candidates = tuple(batch for batch in candidates if batch <= total)
    seconds = {batch: float("inf") for batch in candidates}
    deadline = time.perf_counter() + CALIBRATION_SECONDS[_kind(device)]
    for batch in candidates * 3:
        if time.perf_counter() + batch * min(seconds.values()) > deadline and min(seconds.values()) < float("inf"):
            continue
        try:
            seconds[batch] = min(seconds[batch], _seconds_per_row(run, values, batch))
        except torch.OutOfMemoryError:
            continue
    best = min(seconds, key=lambda batch: seconds[batch])
    return best if seconds[best] < 0.9 * seconds[default] else default


def _seconds_per_row(run: Callable[[tuple[Tensor, ...]], Any], values: tuple[Tensor, ...], batch: int) -> float:
    total, device = len(values[0]), values[0].device
    rows = slice(0, batch) if batch <= total else torch.arange(batch, device=device) % total
    some = tuple(value[rows] for value in values)
    wait_for(device)
    started = time.perf_counter()
    run(some)
    wait_for(device)
    return (time.perf_counter() - started) / batch


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
