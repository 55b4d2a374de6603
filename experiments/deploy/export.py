"""A network for other runtimes: ONNX, int8 ONNX and `torch.export`.

All are exported in evaluation mode from a copy on the CPU, with the batch axis free, written whole or not at all, and
compared with the network before they get their name; int8 answers otherwise by its nature, and is scored instead.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ...atomic import replacing
from ...envs.data.splits import Splits
from ...envs.evaluation.mask_evaluator import accuracy_on
from ...envs.networks.answers import adapter_of, as_called, as_given
from ...envs.networks.copying import copied
from ...envs.networks.inputs import as_call, batch_size, beside, is_batch, mapped, resized, tensors_of
from ...envs.networks.modes import evaluating
from ...envs.networks.module_kinds import Inputs, run
from ...errors import UserError, summarised
from .int8 import calibration_images, quantise

EXTRA = ("onnx", "onnxscript")
RUNTIME = "onnxruntime"
INSTALL = "pip install 'keepdrop[onnx]'"
TOLERANCE = 1e-4
INT8 = "onnx-int8"
FILES = {"onnx": "model.onnx", "program": "model.pt2", INT8: "model.int8.onnx"}
"""Kinds of export and the files they make."""


@dataclass(frozen=True)
class Exported:
    """One exported file: its kind and name, size, and how far it is from the network.

    `largest_difference` is relative to the largest output, over `batch_sizes`. Of an int8 file `accuracy` is what the
    file scores on the report split, `float_accuracy` and `float_bytes` the same network's in float32; else None.
    """

    kind: str
    file: str
    n_bytes: int
    largest_difference: float
    batch_sizes: tuple[int, ...]
    accuracy: float | None = None
    float_accuracy: float | None = None
    float_bytes: int | None = None


def check_exports(kinds: Sequence[str]) -> None:
    """Refuse a kind of export that does not exist, or whose packages are missing (UserError)."""
    for kind in kinds:
        if kind not in FILES:
            raise UserError(f"export has {kind!r}; expected any of {', '.join(FILES)}, as in export=[onnx,program].")
    if {"onnx", INT8} & set(kinds):
        require_onnx(RUNTIME)


def try_exports(kinds: Sequence[str], model: nn.Module, splits: Splits) -> None:
    """Refuse int8 where onnxruntime cannot write this network so, before anything is searched (UserError)."""
    if INT8 in kinds:
        with tempfile.TemporaryDirectory() as folder, evaluating(model):
            try:
                export_int8(
                    *as_exported(model, splits.example),
                    [as_called(model, splits.fit.batch(torch.arange(1))[0])],
                    Path(folder) / FILES[INT8],
                )
            except UserError as error:
                raise UserError(f"export has {INT8}, and that cannot be had: {error}") from error


def require_onnx(*more: str) -> None:
    """UserError unless the packages of the extra `onnx` are there."""
    if missing := missing_packages(*more):
        raise UserError(f"ONNX export needs {' and '.join(missing)}; install them with: {INSTALL}.")


def missing_packages(*more: str) -> list[str]:
    """Packages of the extra `onnx`, and `more`, that are not installed."""
    return [name for name in (*EXTRA, *more) if importlib.util.find_spec(name) is None]


def export_all(
    model: nn.Module, example: Inputs, folder: str | Path, kinds: Sequence[str], splits: Splits | None = None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Export `model` into `folder` in every kind asked for: facts of what was written, and why by kind where not.

    `splits` has the images that int8 is calibrated (fit) and scored (report) on; it cannot be had without.
    """
    made, failed = [], {}
    for kind in kinds:
        try:
            if kind == INT8:
                done = export_scored(model, example, folder, splits)
            else:
                done = export_verified(*as_exported(model, example), folder, kind)
            made.append({name: value for name, value in asdict(done).items() if value is not None})
        except UserError as error:
            failed[kind] = str(error)
    return made, failed


def export_verified(model: nn.Module, example: Inputs, folder: str | Path, kind: str) -> Exported:
    """Export `model` and keep the file only if it answers as the network does, alone and in batches.

    Args:
        model: the network; it is copied, never changed.
        example: images to compare on (`find_groups`).
        folder: where `FILES[kind]` goes.
        kind: "onnx" or "program".

    Raises UserError if it cannot be exported, or differs by more than 1e-4 of the largest output.
    """
    path = Path(folder) / FILES[kind]
    with replacing(path) as trial:
        (export_onnx if kind == "onnx" else export_program)(model, example, trial)
        sizes = tuple(sorted({1, batch_size(example), 3}))
        worst = max(_difference(model, resized(example, size), trial, kind) for size in sizes)
        if not worst <= TOLERANCE:
            raise UserError(f"The exported {path.name} does not answer as the network does (difference {worst:.1e}).")
    return Exported(kind, path.name, path.stat().st_size, worst, sizes)


def export_scored(model: nn.Module, example: Inputs, folder: str | Path, splits: Splits | None) -> Exported:
    """Export `model` as int8 ONNX, calibrated on fit images, and score the file on the report split.

    Args:
        model: the network as it is evaluated; it is copied, never changed.
        example: images to compare on.
        folder: where `FILES["onnx-int8"]` goes.
        splits: three splits of labelled images; the reward and report images calibrate nothing.

    Raises UserError if onnxruntime cannot quantise or run it. A file that scores badly is kept, with its score.
    """
    if splits is None:
        raise UserError(f"{INT8} is calibrated on training images, and there are none; export from a run or a result.")
    path, (network, called) = Path(folder) / FILES[INT8], as_exported(model, example)
    batches = [as_called(model, each) for each in calibration_images(splits.fit)]
    n_bytes = export_int8(network, called, batches, path)
    sizes = tuple(sorted({1, batch_size(called), 3}))
    worst = max(_difference(network, resized(called, size), path, "onnx") for size in sizes)
    in_int8, in_float = FileNetwork(path, model, network, called), model
    scores = accuracy_on(in_int8, splits.report), accuracy_on(in_float, splits.report)
    return Exported(INT8, path.name, path.stat().st_size, worst, sizes, *scores, n_bytes)


def export_int8(model: nn.Module, example: Inputs, calibration: Sequence[Inputs], path: str | Path) -> int:
    """Write `model` as ONNX in int8, quantised by onnxruntime (QDQ, per channel, batch norm folded).

    Args:
        model: it is copied, never changed.
        example: one input, as for `export_onnx`.
        calibration: batches of such inputs, of training images, that show the ranges of activations.
        path: the file.

    Returns the bytes of the same network in float32. Raises UserError if the packages of the extra `onnx` are missing,
    the network cannot be exported, or onnxruntime cannot quantise or run it.
    """
    require_onnx(RUNTIME)
    with tempfile.TemporaryDirectory() as folder, replacing(Path(path)) as temporary:
        float_file = Path(folder) / FILES["onnx"]
        export_onnx(model, example, float_file)
        quantise(float_file, calibration, temporary)
        try:
            onnx_session(temporary)(calibration[0])
        except Exception as error:
            raise UserError(f"onnxruntime cannot run the network as int8 ({summarised(error)}).") from error
        return float_file.stat().st_size


class FileNetwork(nn.Module):
    """An ONNX file as a network that metrics take: images (B, C, ...) -> what counts of its answer.

    Args:
        path: the file.
        model: the network as it is evaluated, whose adapter says how inputs lie in an item and what counts.
        exported, example: the network and the inputs that the file was made of.
    """

    def __init__(self, path: str | Path, model: nn.Module, exported: nn.Module, example: Inputs) -> None:
        super().__init__()
        session, adapter = onnx_session(path), adapter_of(model)
        with torch.no_grad(), evaluating(exported):
            spec = tree_flatten(run(exported, beside(exported, example)))[1]

        def answer(images: Tensor) -> Any:
            packing = None if adapter is None else adapter.packing
            given = session(images if packing is None else packing.unpacked(images))
            answers = tree_unflatten([torch.from_numpy(each) for each in given], spec)
            return answers if adapter is None else adapter.answer(answers, training=False)

        self.answer = answer  # a function is not copied where modules are, and a session cannot be

    def forward(self, images: Tensor) -> Any:
        """The file's answers in the shape of the network's."""
        return self.answer(images)


def export_program(model: nn.Module, example: Inputs, path: str | Path) -> None:
    """Write `model` as a `torch.export` program (.pt2); `torch.export.load(path).module()` runs it.

    Args:
        model: it is copied, never changed.
        example: one input: a tensor (B, ...), a tuple of positional or a mapping of keyword arguments; the program
            takes any B.
        path: the file.

    Raises UserError if the network cannot be exported.
    """
    path = Path(path)
    program = _exported(model, example)
    with replacing(path) as temporary:
        torch.export.save(program, str(temporary))


def export_onnx(model: nn.Module, example: Inputs, path: str | Path) -> None:
    """Write `model` as ONNX, the batch axis free, all weights in the one file.

    Args:
        model: it is copied, never changed.
        example: one input, as for `export_program`. A single tensor is called "images" and a single output "logits";
            several inputs are called as the forward calls them.
        path: the file.

    Raises UserError if the packages of the extra `onnx` are missing or the network cannot be exported.
    """
    require_onnx()
    path = Path(path)
    program = _exported(model, example)
    single = isinstance(example, Tensor)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The exporter warns about its own opset conversions.
            converted = torch.onnx.export(
                program,
                input_names=["images"] if single else None,
                output_names=["logits"] if len(program.graph_signature.user_outputs) == 1 else None,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise UserError(f"The network cannot be written as ONNX ({summarised(error)}).") from error
    assert converted is not None
    _name_batch_axis(converted.model.graph)
    with replacing(path) as temporary:
        converted.save(str(temporary), external_data=False)


def _name_batch_axis(graph: Any) -> None:
    """Call the free axis "batch" in every shape of an ONNX graph: the exporter numbers it, as in "s77" or "2*s77"."""
    symbols = {str(each.shape[0].value) for each in graph.inputs if each.shape and hasattr(each.shape[0], "value")}
    free = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in symbols))
    nodes = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*graph.inputs, *nodes) if symbols else ():
        if value.shape is not None:
            value.shape = type(value.shape)(
                [free.sub("batch", dim.value) if hasattr(dim, "value") and dim.value else dim for dim in value.shape]
            )


def onnx_session(path: str | Path) -> Callable[[Inputs], list[Any]]:
    """Runs an exported ONNX file on the CPU, with as many threads as torch has: inputs -> list of arrays."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    content = Path(path).read_bytes()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def call(inputs: Inputs) -> list[Any]:
        return session.run(None, dict(zip(names, (value.cpu().numpy() for value in tensors_of(inputs)), strict=True)))

    return call


def as_exported(model: nn.Module, example: Inputs) -> tuple[nn.Module, Inputs]:
    """A network as the user calls it, with all its outputs.

    Where it takes one input and answers with an object of a class of its own (Hugging Face), with the output that
    counts: a program with such an object in it needs that class to be loaded.
    """
    adapter = adapter_of(model)
    if adapter is not None and adapter.packing is None:
        with torch.no_grad(), evaluating(model):
            answers = as_given(model)(beside(model, example))
        if type(answers) not in (dict, tuple, list):
            return model, example
    return as_given(model), as_called(model, example)


def _exported(model: nn.Module, example: Inputs) -> torch.export.ExportedProgram:
    # An example of one image would be taken for a network that knows no other number.
    inputs = mapped(resized(example, max(2, batch_size(example))), lambda value: value.cpu().contiguous())
    args, kwargs = as_call(inputs)
    batch, size = torch.export.Dim("batch", min=1), batch_size(inputs)

    def free(value: Any) -> Any:
        return {0: batch} if is_batch(value, size) else None

    shapes: Any = {name: free(value) for name, value in kwargs.items()} if kwargs else tuple(map(free, args))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(copied(model).cpu().eval(), args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise UserError(f"The network cannot be exported ({summarised(error)}).") from error


def _difference(model: nn.Module, inputs: Inputs, path: Path, kind: str) -> float:
    """Largest difference between the file's and the network's answers, relative to the largest answer."""
    inputs = mapped(inputs, lambda value: value.cpu().contiguous())
    with torch.no_grad():
        expected = tree_leaves(run(copied(model).cpu().eval(), inputs))
        if kind == "onnx":
            got = [torch.from_numpy(each) for each in onnx_session(path)(inputs)]
        else:
            got = tree_leaves(run(torch.export.load(path).module(), inputs))
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(got, expected, strict=True))
