"""A network for other runtimes: ONNX and `torch.export`.

Both are exported in evaluation mode from a copy, with the batch axis free, and written whole or not at all.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..rewards.errors import UserError

EXTRA = ("onnx", "onnxscript")


def export_program(model: nn.Module, example: Tensor, path: str | Path) -> None:
    """Write `model` as a `torch.export` program (.pt2); `torch.export.load(path).module()` runs it.

    Args:
        model: takes one tensor; it is copied, never changed.
        example: (B, ...) one input; the program takes any B.
        path: the file.

    Raises UserError if the network cannot be exported.
    """
    path = Path(path)
    program = _exported(model, example)
    _whole(path, lambda temporary: torch.export.save(program, temporary))


def export_onnx(model: nn.Module, example: Tensor, path: str | Path) -> None:
    """Write `model` as ONNX, input "images", output "logits", the batch axis free, all weights in the one file.

    Args:
        model: takes one tensor and returns one; it is copied, never changed.
        example: (B, ...) one input.
        path: the file.

    Raises UserError if the packages of the extra `onnx` are missing or the network cannot be exported.
    """
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX export needs {' and '.join(missing)}; install them with: pip install 'keepdrop[onnx]'.")
    path = Path(path)
    program = _exported(model, example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The exporter warns about its own opset conversions.
            converted = torch.onnx.export(
                program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
            )
    except Exception as error:
        raise UserError(f"The network cannot be written as ONNX ({_first_line(error)}).") from error
    assert converted is not None
    _whole(path, lambda temporary: converted.save(temporary, external_data=False))


def _exported(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    # An example of one image would be taken for a network that knows no other number.
    images = example if len(example) > 1 else torch.cat([example, example])
    batch = torch.export.Dim("batch", min=1)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(copy.deepcopy(model).eval(), (images,), dynamic_shapes=({0: batch},))
    except Exception as error:
        raise UserError(f"The network cannot be exported ({_first_line(error)}).") from error


def _whole(path: Path, save: Callable[[str], object]) -> None:
    """Let `save` write beside `path`, then rename; the old file stays if anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # torch.export insists on the ending.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / f"whole{path.suffix}"
        save(str(temporary))
        temporary.replace(path)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
