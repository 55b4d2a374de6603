"""A probe: a network's answer to one fixed input, stored beside its weights and compared when it is rebuilt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import UserError, first_line
from ..data.packing import Packing
from ..data.randomness import randomness_restored
from ..networks.copying import copied
from ..networks.inputs import tensors_in
from ..networks.module_kinds import run

LARGEST_INPUT, TOLERANCE = 10**7, 1e-2
DAMAGED = "The file's 'probe' is damaged; restore it."


def probe_of(model: nn.Module, shape: Sequence[int], packing: Packing | None) -> dict[str, Any] | None:
    """Shape and outputs, as JSON; None for a network that answers by chance, or not in finite numbers."""
    probed = copied(model).cpu().eval()
    with randomness_restored():
        outputs, again = (_answer(probed, shape, packing) for _ in range(2))
    if outputs != again:
        return None
    several = {} if packing is None else {"inputs": packing.facts()}
    return {"shape": list(shape), **several, "outputs": outputs} if all(map(math.isfinite, outputs)) else None


def check_probe(model: nn.Module, probe: Any) -> None:
    """Raise UserError if `model` (evaluation mode, CPU) answers otherwise; None was not asked and passes."""
    if probe is None:
        return
    shape, packing, expected = _checked(probe)
    try:
        got = _answer(model, shape, packing)
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


def probe_input(probe: Any) -> Any:
    """What a network is called with for a stored probe; UserError for a damaged one."""
    shape, packing, _ = _checked(probe)
    return _input(shape, packing)


def _checked(probe: Any) -> tuple[list[int], Packing | None, list[float]]:
    """Shape of the input, how several inputs lie in it, and outputs."""
    known: Mapping[str, Any] = probe if isinstance(probe, Mapping) else {}
    shape: Any = known.get("shape")
    outputs: Any = known.get("outputs")
    whole = isinstance(shape, list) and all(type(each) is int and 0 < each <= LARGEST_INPUT for each in shape)
    numbers = isinstance(outputs, list) and all(type(each) in (int, float) for each in outputs)
    if not whole or not numbers or math.prod(shape) > LARGEST_INPUT:
        raise UserError(DAMAGED)
    return shape, _checked_packing(known.get("inputs"), shape), outputs


def _checked_packing(facts: Any, shape: list[int]) -> Packing | None:
    if facts is None:
        return None
    try:
        packing = Packing.from_facts(facts)
    except ValueError as error:
        raise UserError(DAMAGED) from error
    if shape != [1, 1, sum(each.size for each in packing.inputs)]:
        raise UserError(DAMAGED)
    return packing


@torch.no_grad()
def _answer(model: nn.Module, shape: Sequence[int], packing: Packing | None = None) -> list[float]:
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    outputs = tensors_in(run(model, _input(shape, packing, dtype)))
    return [number for each in outputs for number in each.double().flatten().tolist()]


def _input(shape: Sequence[int], packing: Packing | None = None, dtype: torch.dtype = torch.float32) -> Any:
    # No random numbers: their generator may change from version to version.
    made = torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(list(shape)).to(dtype)
    return made if packing is None else packing.unpacked(made.abs())  # whole numbers may be indices
