"""A network as other runtimes run it: as it is, compiled by torch, or in onnxruntime."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...envs.networks.copying import copied
from ...envs.networks.inputs import as_call, mapped
from ...envs.networks.module_kinds import Inputs, run
from ...errors import UserError, summarised
from .export import RUNTIME, export_onnx, onnx_session, require_onnx

RUNTIMES = ("eager", "compile", "onnxruntime")
COMPILERS = ("g++", "clang++", "c++", "cl")
Runner = Callable[[Inputs], Any]


def check_runtimes(runtimes: Sequence[str], device: torch.device | str = "cpu") -> None:
    """Refuse runtimes that do not exist or cannot run here (UserError)."""
    for name in runtimes:
        if name not in RUNTIMES:
            raise UserError(f"latency.runtimes has {name!r}; expected any of {', '.join(RUNTIMES)}.")
    if not runtimes or len(set(runtimes)) != len(runtimes):
        raise UserError(f"latency.runtimes is {list(runtimes)}; expected at least one, each one once.")
    on_cpu = torch.device(device).type == "cpu"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if "compile" in runtimes and on_cpu and compiler is None:
        raise UserError("latency.runtimes has compile, which needs a C++ compiler (g++ or clang++); install one.")
    if "onnxruntime" in runtimes:
        if not on_cpu:
            raise UserError(f"latency.runtimes has onnxruntime, which is measured on the CPU, not on {device}.")
        require_onnx(RUNTIME)


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
    return _compiled(model, example) if runtime == "compile" else _in_onnxruntime(model, example)


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
        session = onnx_session(Path(folder) / "model.onnx")
    ready: dict[int, tuple[Inputs, Inputs]] = {}

    def call(inputs: Inputs) -> Any:
        # Bringing images into the memory order of ONNX is not what is measured.
        if id(inputs) not in ready:
            ready[id(inputs)] = (inputs, mapped(inputs, lambda value: value.contiguous()))
        return session(ready[id(inputs)][1])

    return call
