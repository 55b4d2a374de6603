"""Measured time of a forward pass, of several networks side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..rewards.errors import UserError
from .cost import ExampleInputs, as_call, batch_size
from .modes import evaluating


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass (whole batch): median and quartiles over `repeats`, and on what it was measured."""

    model: str
    batch_size: int
    median_seconds: float
    low_seconds: float
    high_seconds: float
    repeats: int
    device: str
    n_threads: int


def measure_latency(
    models: Mapping[str, Callable[..., Any]],
    example_inputs: ExampleInputs,
    batch_sizes: Sequence[int] = (1, 64),
    repeats: int = 30,
    warmup: int = 5,
) -> list[Latency]:
    """Time a forward pass of every model for every batch size, in eval mode, float32, channels-last, no gradients.

    The models take turns within each repeat (in alternating order), so that a busy moment of the machine hits all of
    them. Example inputs are repeated or cut to each batch size, on the device they lie on. Modes come back as they
    were. Raises UserError for a batch size, number of repeats or warm-up that makes no measurement.
    """
    if not models or not batch_sizes or min(batch_sizes) < 1 or repeats < 1 or warmup < 0:
        raise UserError(
            f"Latency needs models, batch sizes of 1 or more, repeats >= 1 and warmup >= 0, got {len(models)} models, "
            f"batch_sizes={tuple(batch_sizes)}, repeats={repeats}, warmup={warmup}."
        )
    networks = [model for model in models.values() if isinstance(model, nn.Module)]
    records = []
    with evaluating(*networks), torch.inference_mode():
        for size in batch_sizes:
            inputs = _resized(example_inputs, size)
            seconds = _interleaved(models, inputs, repeats, warmup)
            records += [_record(name, size, seconds[name], inputs) for name in models]
    return records


def speed_advice(macs_fraction: float, seconds_fraction: float) -> str | None:
    """A sentence for a pruned network that has less to do and is no faster, else None.

    Args:
        macs_fraction: MACs, pruned / dense.
        seconds_fraction: median time, pruned / dense.

    Said where at least a tenth of the MACs went and less than a quarter of that share of the time did.
    """
    if not (macs_fraction > 0 and seconds_fraction > 0):
        raise ValueError(f"fractions must be positive, got {macs_fraction} (MACs) and {seconds_fraction} (seconds).")
    removed, saved = 1 - macs_fraction, 1 - seconds_fraction
    if removed < 0.1 or saved >= removed / 4:
        return None
    return (
        f"MACs fell by {removed:.0%} but time did not ({saved:+.0%} saved): processors like round channel counts, "
        "try round_to=8."
    )


def _interleaved(
    models: Mapping[str, Callable[..., Any]], inputs: ExampleInputs, repeats: int, warmup: int
) -> dict[str, list[float]]:
    args, kwargs = as_call(inputs)
    device = _device(inputs)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(-warmup, repeats):
        for name in list(models)[:: 1 if repeat % 2 else -1]:
            _wait_for(device)
            start = time.perf_counter()
            models[name](*args, **kwargs)
            _wait_for(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _record(name: str, size: int, seconds: list[float], inputs: ExampleInputs) -> Latency:
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return Latency(name, size, median, low, high, len(seconds), str(_device(inputs)), torch.get_num_threads())


def _resized(example_inputs: ExampleInputs, size: int) -> ExampleInputs:
    """Every tensor that has the batch axis, cut or repeated to `size`; images channels-last."""
    given = batch_size(example_inputs)

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != given:
            return value
        value = value.repeat(-(-size // given), *[1] * (value.dim() - 1))[:size]
        return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value.contiguous()

    args, kwargs = as_call(example_inputs)
    return {name: resize(value) for name, value in kwargs.items()} if kwargs else tuple(map(resize, args))


def _device(inputs: ExampleInputs) -> torch.device:
    args, kwargs = as_call(inputs)
    return next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
