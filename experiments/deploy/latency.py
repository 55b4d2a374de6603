"""Measured time of a forward pass, of several networks in several runtimes side by side."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...envs.networks.batch_size import wait_for
from ...envs.networks.inputs import as_call, resized, tensors_of
from ...envs.networks.memory_layout import arranged, common_layout
from ...envs.networks.modes import evaluating
from ...envs.networks.module_kinds import Inputs
from ...errors import UserError
from .export import RUNTIME
from .runtimes import Runner, chosen_runtimes, from_file, runner

SCATTERED = 2.0  # upper quartile, of the median: other programs had the processor
OVERHEAD = 1e-3  # seconds: of a pass shorter than this, calling the layers takes a good part


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass (whole batch): median and quartiles over `repeats`, and on what it was measured.

    `device` is the name of the processor or GPU; `n_threads` those of the processor that a pass may use, 0 on a GPU.
    """

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
    files: Mapping[str, str | Path] | None = None,
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
        runtimes: any of "eager", "compile", "onnxruntime", "cuda-graphs" (all but the first take `nn.Module`s only), or
            "all" alone: what can be timed here.
        failed: gets the reason of every runtime that cannot take a model, which is then left out; None raises it.
        files: ONNX files by name, each timed in onnxruntime beside the models.

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
        chosen = chosen_runtimes(runtimes, _device(example_inputs))
        runners = _runners(models, chosen, arranged(resized(example_inputs, batch_sizes[0]), layout), failed)
        runners |= {(RUNTIME, name): from_file(path) for name, path in (files or {}).items()}
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


def speed_change(base: Mapping[str, Any], pruned: Mapping[str, Any]) -> str:
    """How much faster or slower `pruned` is than `base`, two records of the same batch: "1.25 x faster".

    Args:
        base, pruned: `Latency` as mappings; without quartiles their spread is taken for none.

    "about" is put before it where the quartiles overlap; medians equal to two digits are "no change".
    """
    before, after = base["median_seconds"], pruned["median_seconds"]
    ratio = f"{max(before, after) / min(before, after):.2f}"
    if ratio == "1.00":
        return "no change"
    (_, fast), (slow, _) = sorted((_quartiles(base), _quartiles(pruned)), key=lambda each: each[1])
    about = "about " if fast >= slow else ""
    return f"{about}{ratio} x {'faster' if after < before else 'slower'}"


def speed_advice(macs_fraction: float, latency: Sequence[Mapping[str, Any]], round_to: int = 1) -> str | None:
    """A sentence for a pruned network that has less to do and is hardly faster, else None.

    Args:
        macs_fraction: MACs, pruned / dense.
        latency: `Latency` as mappings, of the models "base" and "pruned".
        round_to: the channel multiple it was pruned with.

    Said where at least a tenth of the MACs went and less than a quarter of that share of the time did. The reason is
    measured: the part of a pass that takes as long for one image as for many (`fixed_share`) is no arithmetic.
    """
    if not macs_fraction > 0:
        raise ValueError(f"macs_fraction must be positive, got {macs_fraction}.")
    removed, slow = 1 - macs_fraction, {}
    for key, (base, pruned) in paired(latency).items():
        saved = 1 - pruned["median_seconds"] / base["median_seconds"]
        if removed >= 0.1 and saved < removed / 4:
            slow[key] = saved
    if not slow:
        return None
    times = ", ".join(f"{_percent(-saved)} at batch {batch} ({runtime})" for (runtime, batch), saved in slow.items())
    reasons: dict[str, str] = {}  # one of a kind, of the first pass that has it
    for key in slow:
        kind, sentence = _reason(latency, *key, round_to)
        reasons.setdefault(kind, sentence)
    why = " ".join(reasons.values())
    return f"MACs changed by {_percent(-removed)}, but the time of a pass by {times}. {why}"


def _reason(latency: Sequence[Mapping[str, Any]], runtime: str, batch: int, round_to: int) -> tuple[str, str]:
    """Why fewer MACs did not make this pass shorter: the kind of reason, and a sentence."""
    base, pruned = paired(latency)[runtime, batch]
    late, typical = max((_quartiles(each)[1], each["median_seconds"]) for each in (base, pruned))
    if late > SCATTERED * typical:
        return "busy", (
            f"At batch {batch} a quarter of the passes took {1e3 * late:.2f} ms or more and half of them at most "
            f"{1e3 * typical:.2f} ms ({runtime}): the machine was busy, and these times say little."
        )
    share = fixed_share(latency, runtime, batch)
    if share is None and base["median_seconds"] < OVERHEAD:
        return "short", "Passes of less than a millisecond are mostly overhead, which pruning does not remove."
    if share is not None and share > 0.5:
        others = "compile and cuda-graphs" if base.get("n_threads") == 0 else "compile and onnxruntime"
        other = f": {others} have less of it (latency.runtimes=[all])" * (runtime == "eager")
        return "calls", (
            f"At batch {batch} about {100 * share:.0f} % of the dense network's {1e3 * base['median_seconds']:.2f} ms "
            f"({runtime}) goes into calling layers, which takes as long for few filters as for many{other}."
        )
    multiple = next((each for each in (8, 16, 32) if each > round_to), 2 * round_to)
    return "widths", f"Processors are fastest with round channel counts: try surgery.round_to={multiple}."


def fixed_share(latency: Sequence[Mapping[str, Any]], runtime: str, batch: int) -> float | None:
    """The part of the dense network's pass that does not grow with the number of images, a fraction of its time.

    From the smallest and the largest batch size of a runtime, as if time were a + b * images; what `a` pays for is
    calling the layers. None where the largest is less than 8 times the smallest, which would be guessing.
    """
    seconds = {size: pair[0]["median_seconds"] for (name, size), pair in paired(latency).items() if name == runtime}
    few, many = min(seconds), max(seconds)
    if many < 8 * few:
        return None
    per_image = (seconds[many] - seconds[few]) / (many - few)
    return min(1.0, max(0.0, (seconds[few] - few * per_image) / seconds[batch]))


def paired(
    latency: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, int], tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Records of "base" and "pruned", by runtime and batch size (a run of an earlier version knew one runtime)."""
    by_key = {(each.get("runtime", "eager"), each["batch_size"], each["model"]): each for each in latency}
    keys = dict.fromkeys((runtime, batch) for runtime, batch, _ in by_key)
    return {
        key: (by_key[*key, "base"], by_key[*key, "pruned"])
        for key in keys
        if (*key, "base") in by_key and (*key, "pruned") in by_key
    }


def _percent(fraction: float) -> str:
    return f"{round(100 * fraction) + 0:+d} %" if round(100 * fraction) else "0 %"


def _quartiles(record: Mapping[str, Any]) -> tuple[float, float]:
    median = record["median_seconds"]
    return record.get("low_seconds", median), record.get("high_seconds", median)


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
            took = pass_seconds(runners[key], inputs, device)
            if repeat >= 0:
                seconds[key].append(took)
    return seconds


def pass_seconds(
    run: Runner, inputs: Inputs, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one pass: by `clock`, on an NVIDIA GPU by events, which see the gaps between kernels."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        wait_for(device)
        start.record(stream)
        run(inputs)
        end.record(stream)
        wait_for(device)
        return float(start.elapsed_time(end)) / 1e3
    wait_for(device)
    began = clock()
    run(inputs)
    wait_for(device)
    return clock() - began


def _record(runtime: str, name: str, size: int, seconds: list[float], inputs: Inputs) -> Latency:
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    device = _device(inputs)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return Latency(name, size, median, low, high, len(seconds), device_name(device), threads, runtime)


def device_name(device: torch.device | str) -> str:
    """What a person calls a device: the GPU's name, or the processor's model."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "cpu"


def _device(inputs: Inputs) -> torch.device:
    return tensors_of(inputs)[0].device
