"""int8 after pruning: static quantisation of an ONNX file by onnxruntime's own tools, calibrated on fit images.

Weights are quantised per output channel and activations per tensor, in QDQ format, after onnxruntime's pre-processing,
which folds batch norm into convolutions (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
Ranges of activations are the smallest and largest values over the calibration images (MinMax).
"""

from __future__ import annotations

import logging
import platform
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...envs.data.images import LabelledImages
from ...envs.networks.inputs import tensors_of
from ...envs.networks.module_kinds import Inputs
from ...errors import UserError, summarised

CALIBRATION_IMAGES, BATCH = 256, 32
FAR = 0.02  # of accuracy: a file that loses more than its float network is not used without a look


def calibration_images(fit: LabelledImages) -> list[torch.Tensor]:
    """At most 256 fit images in batches of 32, evenly spread, as sorted data would show one class alone."""
    rows = torch.linspace(0, len(fit) - 1, min(CALIBRATION_IMAGES, len(fit))).long().unique()
    return [fit.batch(part)[0] for part in rows.split(BATCH)]


def quantise(source: str | Path, batches: Sequence[Inputs], target: str | Path) -> None:
    """Write the float ONNX file `source` as int8 to `target`.

    Args:
        source: an exported network, with as many inputs as `batches` have tensors.
        batches: what it is calibrated with.
        target: the file.

    Raises UserError where onnxruntime cannot quantise the network, or finds no layer that it could.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        try:
            prepared = _prepared(str(source), Path(folder))
            _quantised(prepared, batches, str(target))
            import onnx

            kinds = {node.op_type for node in onnx.load(str(target)).graph.node}
        except Exception as error:
            raise UserError(f"onnxruntime cannot write the network as int8 ({summarised(error)}).") from error
    if "QuantizeLinear" not in kinds:
        raise UserError("onnxruntime finds no layer of the network that it could write as int8; use export=[onnx].")


def int8_sentence(facts: Mapping[str, Any], metric: str) -> str:
    """What became of an int8 file: size and score beside those of float32, and a warning where much is lost.

    Args:
        facts: `Exported` as a mapping.
        metric: the metric's name for display.
    """
    lost = facts["float_accuracy"] - facts["accuracy"]
    far = " It scores far worse: check it before use, or keep float32." if lost > FAR else ""
    change = f"{-100 * lost + 0:+.2f} points" if round(100 * lost, 2) else "no change"
    return (
        f"{facts['file']}: onnx-int8, {facts['n_bytes'] / 1e3:,.1f} kB (float32 {facts['float_bytes'] / 1e3:,.1f} kB), "
        f"{metric} {100 * facts['accuracy']:.2f} % on the report split (float32 {100 * facts['float_accuracy']:.2f} %: "
        f"{change}).{far}"
    )


def _prepared(source: str, folder: Path) -> str:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    target = str(folder / "prepared.onnx")
    try:
        quant_pre_process(source, target)
    except Exception:  # symbolic shapes do not work out for every network, and are not needed for most
        quant_pre_process(source, target, skip_symbolic_shape=True)
    return target


def _quantised(source: str, batches: Sequence[Inputs], target: str) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        source,
        target,
        _reader(source, batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8 if _is_arm() else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=_saturates(),
    )


def _reader(source: str, batches: Sequence[Inputs]) -> Any:
    """The calibration images as onnxruntime's tool takes them: one mapping after the other, then None."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    names = [each.name for each in onnx.load(source).graph.input]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            if batch is None:
                return None
            return dict(zip(names, (value.cpu().contiguous().numpy() for value in tensors_of(batch)), strict=True))

    return Reader()


def _is_arm() -> bool:
    return platform.machine().lower() in ("arm64", "aarch64")


def _saturates() -> bool:
    """Whether this CPU adds 8-bit products up in 16 bits, as x86 without VNNI: weights then get 7 bits."""
    knows = getattr(torch.cpu, "_is_vnni_supported", None)
    return not _is_arm() and not (knows is not None and knows())


@contextmanager
def _quiet() -> Iterator[None]:
    """The tools log advice that has been followed already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
