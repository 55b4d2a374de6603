"""A pruned network in onnxruntime without exporting it again: the dense network's ONNX file with its weights cut.

Exporting takes seconds, and a latency profile needs a hundred pruned copies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ...envs.networks.inputs import mapped
from ...envs.networks.module_kinds import Inputs, is_depthwise, run
from ...envs.surgery.cutting import KeptRows
from ...envs.surgery.slicing import width
from .export import TOLERANCE, export_onnx
from .runtimes import Runner, from_file


class CuttableOnnx:
    """The ONNX file of a dense network.

    Args:
        model: the dense network.
        example: what it is exported with.
    """

    def __init__(self, model: nn.Module, example: Inputs) -> None:
        import onnx

        self._model, self._example = model, example
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            with torch.inference_mode(False):
                export_onnx(model, mapped(example, torch.Tensor.clone), path)
            self._dense = onnx.load(str(path))
        _flatten_to_any_width(self._dense.graph)
        modules = dict(model.named_modules())
        self._owner = {
            each.name: owner for each in self._dense.graph.initializer if (owner := _owner(each.name, modules))
        }

    def session(self, model: nn.Module, kept: KeptRows) -> Runner | None:
        """onnxruntime with only these channels; None where the file cannot be cut so, and `model` has to be exported.

        Args:
            model: the network with only these channels, which the answers are compared with.
            kept: what stays (`cutting.kept_rows`).
        """
        try:
            run = self._cut(kept)
            return run if _answers_alike(run, model, self._example) else None
        except Exception:  # whatever onnxruntime says of a graph that does not fit together
            return None

    def _cut(self, kept: KeptRows) -> Runner:
        import onnx

        smaller = onnx.ModelProto()
        smaller.CopyFrom(self._dense)
        del smaller.graph.value_info[:]
        for each in smaller.graph.initializer:
            name = self._owner.get(each.name, "")
            if name in kept:
                whole = onnx.numpy_helper.to_array(each)
                part = _cut(whole, self._model.get_submodule(name), kept[name])
                each.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(part), each.name))
        self._set_groups(smaller.graph, kept)
        with tempfile.TemporaryDirectory() as folder:
            (path := Path(folder) / "model.onnx").write_bytes(smaller.SerializeToString())
            return from_file(path)

    def _set_groups(self, graph: Any, kept: KeptRows) -> None:
        """A depthwise convolution has as many groups as channels."""
        for node in (node for node in graph.node if node.op_type == "Conv"):
            name = self._owner.get(node.input[1], "")
            if name in kept and is_depthwise(self._model.get_submodule(name)):
                for attribute in (each for each in node.attribute if each.name == "group"):
                    attribute.i = len(kept[name]["out"])


def _answers_alike(session: Runner, model: nn.Module, inputs: Inputs) -> bool:
    """Whether a session answers as the pruned network does."""
    with torch.no_grad():
        expected = tree_leaves(run(model, inputs))
    got = [torch.from_numpy(each) for each in session(inputs)]
    return all(
        a.shape == b.shape and float((a - b).abs().max()) <= 10 * TOLERANCE * float(b.abs().max())
        for a, b in zip(got, expected, strict=True)
    )


def _flatten_to_any_width(graph: Any) -> None:
    """The exporter writes a flattening as a reshape to (-1, width); here to (batch, whatever is there)."""
    import onnx

    shapes = {each.name: each for each in graph.initializer}
    for node in graph.node:
        shape = shapes.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is not None and list(shape.dims) == [2]:
            shape.CopyFrom(onnx.numpy_helper.from_array(np.array([0, -1], dtype=np.int64), shape.name))
            del node.attribute[:]


def _owner(initializer: str, modules: Mapping[str, nn.Module]) -> str:
    parts = initializer.split(".")[:-1]
    name = ".".join(parts)
    return name if name in modules else ""


def _cut(whole: Any, module: nn.Module, rows: Mapping[str, Any]) -> Any:
    for axis, dim in (("out", 0), ("in", 1)):
        if axis in rows and whole.ndim > dim and whole.shape[dim] == width(module, axis):
            whole = whole.take(rows[axis], dim)
    return whole
