"""A network as other runtimes run it: as it is, compiled by torch, in onnxruntime, or as a CUDA graph."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...envs.networks.copying import copied
from ...envs.networks.inputs import as_call, mapped, tensors_of
from ...envs.networks.module_kinds import Inputs, run
from ...errors import UserError, summarised
from ..training.graphs import WARM, capture_of
from .export import INSTALL, RUNTIME, export_onnx, missing_packages, onnx_session

CUDA_GRAPHS = "cuda-graphs"
RUNTIMES = ("eager", "compile", "onnxruntime", CUDA_GRAPHS)
ALL = "all"
COMPILERS = ("g++", "clang++", "c++", "cl")
Runner = Callable[[Inputs], Any]


def check_runtimes(runtimes: Sequence[str], device: torch.device | str = "cpu") -> None:
    """Refuse runtimes that do not exist or cannot run here (UserError); `["all"]` is whatever can."""
    if list(runtimes) == [ALL]:
        return
    for name in runtimes:
        if name not in RUNTIMES:
            raise UserError(f"latency.runtimes has {name!r}; expected any of {', '.join(RUNTIMES)}, or all alone.")
    if not runtimes or len(set(runtimes)) != len(runtimes):
        raise UserError(f"latency.runtimes is {list(runtimes)}; expected at least one, each one once.")
    for name in runtimes:
        if why := why_not(name, device):
            raise UserError(f"latency.runtimes has {name}, which {why}")


def why_not(runtime: str, device: torch.device | str = "cpu") -> str | None:
    """Why a runtime cannot be timed here, as the end of a sentence; None where it can."""
    on_cpu = torch.device(device).type == "cpu"
    if runtime == CUDA_GRAPHS:
        others = ", ".join(name for name in RUNTIMES if name != CUDA_GRAPHS)
        on_gpu = torch.device(device).type == "cuda"
        return None if on_gpu else f"needs a CUDA GPU, and the device is {device}; expected any of {others} there."
    if runtime == "compile" and on_cpu:
        compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
        return None if compiler else "needs a C++ compiler (g++ or clang++); install one."
    if runtime == "onnxruntime" and not on_cpu:
        return f"is measured on the CPU, not on {device}."
    missing = missing_packages(RUNTIME) if runtime == "onnxruntime" else []
    return f"needs {' and '.join(missing)}; install them with: {INSTALL}." if missing else None


def chosen_runtimes(asked: Sequence[str], device: torch.device | str = "cpu") -> list[str]:
    """The runtimes asked for; of `["all"]` those that can be timed here."""
    if list(asked) != [ALL]:
        return list(asked)
    return [name for name in RUNTIMES if why_not(name, device) is None]


def not_timed(timed: Iterable[str], device: torch.device | str = "cpu") -> dict[str, str]:
    """Every other runtime, with what it takes to have it timed; of another kind of device none is missed."""
    here = (name for name in RUNTIMES if name != CUDA_GRAPHS or torch.device(device).type == "cuda")
    left = (name for name in here if name not in set(timed))
    return {name: why_not(name, device) or "was not asked for: latency.runtimes=[all] times it." for name in left}


def runner(model: nn.Module, runtime: str, example: Inputs) -> Runner:
    """`model` in a runtime, ready and warm: inputs -> outputs.

    Args:
        model: in evaluation mode; copied where the runtime changes it.
        runtime: one of `RUNTIMES`.
        example: inputs to compile or export it with.

    Raises UserError where the runtime cannot take the network.
    """
    if runtime == "eager":
        return lambda inputs: run(model, inputs)
    if runtime == CUDA_GRAPHS:
        return _as_graphs(model, example)
    return _compiled(model, example) if runtime == "compile" else _in_onnxruntime(model, example)


def _as_graphs(model: nn.Module, example: Inputs) -> Runner:
    device = tensors_of(example)[0].device
    capture = capture_of(device)
    if capture is None:
        raise UserError(f"runtimes has {CUDA_GRAPHS}, which {why_not(CUDA_GRAPHS, device)}")
    # One graph for each shape of inputs, which are copied into the graph's own, as they are in use.
    captured: dict[Any, tuple[list[torch.Tensor], Any, Callable[[], None]]] = {}

    def call(inputs: Inputs) -> Any:
        tensors = tensors_of(inputs)
        shapes = tuple((each.shape, each.stride(), each.dtype) for each in tensors)
        if shapes not in captured:
            static = mapped(inputs, torch.Tensor.clone)
            with capture.streaming():
                for _ in range(WARM):
                    run(model, static)
                captured[shapes] = tensors_of(static), *capture.record(lambda: run(model, static))
        own, outputs, replay = captured[shapes]
        for mine, theirs in zip(own, tensors, strict=True):
            mine.copy_(theirs)
        replay()
        return outputs

    try:
        call(example)
    except Exception as error:
        raise UserError(
            f"CUDA graphs cannot take the network ({summarised(error)}); expected a pass that reads no values back "
            "from the GPU."
        ) from error
    return call


def _compiled(model: nn.Module, example: Inputs) -> Runner:
    # Static shapes: every batch size gets the code it would get in use.
    compiled: Any = torch.compile(copied(model).eval(), dynamic=False)

    def call(inputs: Inputs) -> Any:
        args, kwargs = as_call(inputs)
        return compiled(*args, **kwargs)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(example)
    except Exception as error:
        raise UserError(f"torch.compile cannot take the network ({summarised(error)}).") from error
    return call


def _in_onnxruntime(model: nn.Module, example: Inputs) -> Runner:
    # Exporting wants tensors that gradients may know.
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        export_onnx(model, mapped(example, torch.Tensor.clone), Path(folder) / "model.onnx")
        return from_file(Path(folder) / "model.onnx")


def from_file(path: str | Path) -> Runner:
    """An ONNX file in onnxruntime, on the CPU."""
    session = onnx_session(path)
    ready: dict[int, tuple[Inputs, Inputs]] = {}

    def call(inputs: Inputs) -> Any:
        # Bringing images into the memory order of ONNX is not what is measured.
        if id(inputs) not in ready:
            ready[id(inputs)] = (inputs, mapped(inputs, lambda value: value.contiguous()))
        return session(ready[id(inputs)][1])

    return call
