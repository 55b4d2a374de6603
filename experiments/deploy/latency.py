"""Measured time of a forward pass, of several networks in several runtimes side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...envs.networks.batch_size import wait_for
from ...envs.networks.inputs import as_call, resized, tensors_of
from ...envs.networks.memory_layout import arranged, common_layout
from ...envs.networks.modes import evaluating
from ...envs.networks.module_kinds import Inputs
from ...errors import UserError
from .runtimes import Runner, runner


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
    runtime: str = "eager"


def measure_latency(
    models: Mapping[str, Callable[..., Any]],
    example_inputs: Inputs,
    batch_sizes: Sequence[int] = (1, 64),
    repeats: int = 30,
    warmup: int = 5,
    runtimes: Sequence[str] = ("eager",),
    failed: dict[str, str] | None = None,
) -> list[Latency]:
    """Time a forward pass of every model for every batch size, in eval mode, float32, no gradients.

    Images are channels-last if all networks take them so and contiguous otherwise.

    The models (and runtimes) take turns within each repeat, in alternating order, so that a busy moment of the machine
    hits all of them. Example inputs are repeated or cut to each batch size, on the device they lie on. Modes come back
    as they were.

    Args:
        models: networks by name.
        example_inputs: a tensor (B, ...), a tuple of positional or a mapping of keyword arguments.
        batch_sizes: images per pass.
        repeats: timed passes.
        warmup: passes before them; a runtime that compiles has done so before.
        runtimes: any of "eager", "compile", "onnxruntime"; the latter two take `nn.Module`s only.
        failed: gets the reason of every runtime that cannot take a model, which is then left out; None raises it.

    Raises UserError for a batch size, number of repeats or warm-up that makes no measurement.
    """
    if not models or not batch_sizes or min(batch_sizes) < 1 or repeats < 1 or warmup < 0:
        raise UserError(
            f"Latency needs models, batch sizes of 1 or more, repeats >= 1 and warmup >= 0, got {len(models)} models, "
            f"batch_sizes={tuple(batch_sizes)}, repeats={repeats}, warmup={warmup}."
        )
    networks = [model for model in models.values() if isinstance(model, nn.Module)]
    layout = common_layout(networks, example_inputs)
    records = []
    with evaluating(*networks), torch.inference_mode():
        runners = _runners(models, runtimes, arranged(resized(example_inputs, batch_sizes[0]), layout), failed)
        for size in batch_sizes:
            inputs = arranged(resized(example_inputs, size), layout)
            seconds = _interleaved(runners, inputs, repeats, warmup)
            records += [_record(*key, size, seconds[key], inputs) for key in runners]
    return records


def _runners(
    models: Mapping[str, Callable[..., Any]], runtimes: Sequence[str], inputs: Inputs, failed: dict[str, str] | None
) -> dict[tuple[str, str], Runner]:
    """By runtime and model name; a runtime that one model fails in is left out for all."""
    made: dict[tuple[str, str], Runner] = {}
    for runtime in runtimes:
        try:
            made |= {(runtime, name): _one(model, runtime, inputs) for name, model in models.items()}
        except UserError as error:
            if failed is None:
                raise
            failed[runtime] = str(error)
    return made


def _one(model: Callable[..., Any], runtime: str, inputs: Inputs) -> Runner:
    if isinstance(model, nn.Module):
        return runner(model, runtime, inputs)

    def call(inputs: Inputs) -> Any:
        args, kwargs = as_call(inputs)
        return model(*args, **kwargs)

    return call


def speed_advice(macs_fraction: float, seconds_fraction: float, round_to: int = 1) -> str | None:
    """A sentence for a pruned network that has less to do and is no faster, else None.

    Args:
        macs_fraction: MACs, pruned / dense.
        seconds_fraction: median time, pruned / dense.
        round_to: the channel multiple it was pruned with.

    Said where at least a tenth of the MACs went and less than a quarter of that share of the time did.
    """
    if not (macs_fraction > 0 and seconds_fraction > 0):
        raise ValueError(f"fractions must be positive, got {macs_fraction} (MACs) and {seconds_fraction} (seconds).")
    removed, saved = 1 - macs_fraction, 1 - seconds_fraction
    if removed < 0.1 or saved >= removed / 4:
        return None
    multiple = next((each for each in (8, 16, 32) if each > round_to), 2 * round_to)
    return (
        f"MACs fell by {removed:.0%} but time did not ({seconds_fraction:.2f} x what it was): processors like round "
        f"channel counts, try surgery.round_to={multiple}."
    )


def _interleaved(
    runners: Mapping[tuple[str, str], Runner], inputs: Inputs, repeats: int, warmup: int
) -> dict[tuple[str, str], list[float]]:
    device = _device(inputs)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runners}
    for key in runners:
        if key[0] != "eager":
            runners[key](inputs)  # a new batch size is compiled anew
    for repeat in range(-warmup, repeats):
        for key in list(runners)[:: 1 if repeat % 2 else -1]:
            wait_for(device)
            start = time.perf_counter()
            runners[key](inputs)
            wait_for(device)
            if repeat >= 0:
                seconds[key].append(time.perf_counter() - start)
    return seconds


def _record(runtime: str, name: str, size: int, seconds: list[float], inputs: Inputs) -> Latency:
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    threads, device = torch.get_num_threads(), str(_device(inputs))
    return Latency(name, size, median, low, high, len(seconds), device, threads, runtime)


def _device(inputs: Inputs) -> torch.device:
    return tensors_of(inputs)[0].device
