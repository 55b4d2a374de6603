"""A network's answer to one fixed input, kept beside its weights: it tells what shapes cannot (strides, activations).

Shapes: the input is that of one image with a batch axis, (1, ...).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...errors import UserError, first_line

LARGEST_INPUT, TOLERANCE = 10**7, 1e-2


def probe_of(model: nn.Module, shape: Sequence[int]) -> dict[str, Any] | None:
    """Shape and outputs, as JSON; None for a network that does not answer in finite numbers."""
    outputs = _answer(copy.deepcopy(model).cpu().eval(), shape)
    return {"shape": list(shape), "outputs": outputs} if all(map(math.isfinite, outputs)) else None


def check_probe(model: nn.Module, probe: Any) -> None:
    """Raise UserError if `model` (evaluation mode, CPU) answers otherwise; None was not asked and passes."""
    if probe is None:
        return
    shape, expected = _checked(probe)
    try:
        got = _answer(model, shape)
    except Exception as error:
        raise UserError(
            f"The constructor's network does not run on the file's probe {shape} ({first_line(error)})."
        ) from error
    largest = max(map(abs, expected), default=0.0)
    apart = max((abs(a - b) for a, b in zip(got, expected, strict=False)), default=0.0)
    if len(got) != len(expected) or not apart <= TOLERANCE * largest:
        raise UserError(
            "The constructor's network has the shapes of the file and answers otherwise; it must be built as the one "
            "that was pruned (strides, activations, order of layers)."
        )


def _checked(probe: Any) -> tuple[list[int], list[float]]:
    known: Mapping[str, Any] = probe if isinstance(probe, Mapping) else {}
    shape: Any = known.get("shape")
    outputs: Any = known.get("outputs")
    whole = isinstance(shape, list) and all(type(each) is int and 0 < each <= LARGEST_INPUT for each in shape)
    numbers = isinstance(outputs, list) and all(type(each) in (int, float) for each in outputs)
    if not whole or not numbers or math.prod(shape) > LARGEST_INPUT:
        raise UserError("The file's 'probe' is damaged; restore it.")
    return shape, outputs


@torch.no_grad()
def _answer(model: nn.Module, shape: Sequence[int]) -> list[float]:
    # No random numbers: their generator may change from version to version.
    values = torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(list(shape))
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    outputs = [each for each in tree_leaves(model(values.to(dtype))) if isinstance(each, Tensor)]
    return [number for each in outputs for number in each.double().flatten().tolist()]
