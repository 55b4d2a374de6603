"""Several inputs of a network (Siamese pairs, image and vector, keyword arguments) in one tensor, and out of it again.

An item of a data set may be a tuple of tensors, which a network takes as positional arguments, or a mapping, which it
takes as keyword arguments. Behind `LabelledImages` every item is one tensor: the inputs lie there end to end, as a
signal (1, K) of one channel, and `Packing` knows where each begins.

Shapes: B items of a batch, K numbers of an item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError

MOST = 2**24  # the largest whole number that float32 and all below it hold exactly
DTYPES = {str(each).removeprefix("torch."): each for each in (torch.float32, torch.int64, torch.bool)}


@dataclass(frozen=True)
class PackedInput:
    """One input: the keyword it goes by (None: by its position), its shape without the batch axis, and its type."""

    name: str | None
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Numbers of one item."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __str__(self) -> str:
        return f"{f'{self.name} ' if self.name else ''}{self.shape}"


@dataclass(frozen=True)
class Packing:
    """Where each input lies in an item (1, K), float32; whole numbers come out as int64 and yes or no as bool."""

    inputs: tuple[PackedInput, ...]

    @classmethod
    def of(cls, item: Any) -> Packing:
        """The packing of one item: a tuple or a mapping of tensors, arrays or numbers, without a batch axis.

        UserError for anything else in it.
        """
        return cls(tuple(PackedInput(name, tuple(value.shape), _kind(value)) for name, value in _named(item)))

    def pack(self, item: Any) -> Tensor:
        """An item (1, K) float32; UserError where it is not like the first one."""
        named = _named(item)
        found = Packing(tuple(PackedInput(name, tuple(value.shape), _kind(value)) for name, value in named))
        if found != self:
            raise UserError(
                f"The inputs of a dataset's items differ: {found}, those of the first were {self}; give all of them"
                " the same names, shapes and types."
            )
        return torch.cat([_as_float(value).reshape(-1) for _, value in named])[None]

    def unpacked(self, packed: Tensor) -> tuple[Any, ...] | dict[str, Any]:
        """What the network is called with: a tuple of positional or a mapping of keyword arguments, (B, ...) each.

        `packed` (B, 1, K); floating inputs keep its type.
        """
        start, values = 0, []
        for each in self.inputs:
            value = packed[:, 0, start : start + each.size].reshape(-1, *each.shape)
            values.append(value if each.dtype == "float32" else value.round().to(DTYPES[each.dtype]))
            start += each.size
        if self.inputs[0].name is None:
            return tuple(values)
        return {str(each.name): value for each, value in zip(self.inputs, values, strict=True)}

    @property
    def has_integers(self) -> bool:
        """Whether an input holds whole numbers, which no shorter type than float32 may carry."""
        return any(each.dtype == "int64" for each in self.inputs)

    def facts(self) -> list[list[Any]]:
        """As JSON; `from_facts` reads it."""
        return [[each.name, list(each.shape), each.dtype] for each in self.inputs]

    @classmethod
    def from_facts(cls, facts: Any) -> Packing:
        """ValueError for anything but what `facts` gave."""
        inputs = []
        for each in facts if isinstance(facts, list) and facts else [None]:
            name, shape, dtype = each if isinstance(each, list) and len(each) == 3 else (None, None, None)
            sides = shape if isinstance(shape, list) else [-1]
            proper = all(type(side) is int and 0 <= side <= MOST for side in sides) and dtype in list(DTYPES)
            if not (name is None or isinstance(name, str)) or not proper:
                raise ValueError(f"{each!r} is no input")
            inputs.append(PackedInput(name, tuple(sides), str(dtype)))
        return cls(tuple(inputs))

    def __str__(self) -> str:
        return ", ".join(map(str, self.inputs))


def packed_batch(inputs: Any) -> tuple[Tensor, Packing]:
    """A batch of several inputs, a tuple or mapping of tensors (n, ...), as (n, 1, K) with its packing."""
    named = _named(inputs)
    counts = {len(value) if value.dim() else -1 for _, value in named}
    if len(counts) != 1 or counts == {-1}:
        shapes = ", ".join(str(tuple(value.shape)) for _, value in named)
        raise UserError(f"The inputs have shapes {shapes}; expected as many items along the first axis of each.")
    packing = Packing(tuple(PackedInput(name, tuple(value.shape[1:]), _kind(value)) for name, value in named))
    n_items = counts.pop()
    return torch.cat([_as_float(value).reshape(n_items, -1) for _, value in named], 1)[:, None], packing


def is_several(value: Any) -> bool:
    """Whether an item, or a batch, is a tuple, list or mapping with at least one tensor or array in it."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, tuple | list) and any(isinstance(each, Tensor | np.ndarray) for each in value)


def packing_of(images: Any) -> Packing | None:
    """How the inputs lie in the items of `LabelledImages`; None where the network takes them as they are."""
    found = getattr(images, "packing", None)
    inner = getattr(images, "images", None)
    return packing_of(inner) if found is None and inner is not None else found


def as_tensor(value: Any) -> Tensor:
    """A tensor of any array or number; numpy's views of negative strides and its read-only memory are copied first."""
    if isinstance(value, np.ndarray) and not (value.flags.writeable and value.flags.c_contiguous):
        value = value.copy()  # torch does not take the one, and warns of the other
    return torch.as_tensor(value)


def _named(item: Any) -> list[tuple[str | None, Tensor]]:
    """Inputs in order: those of a mapping by name, as items may name them in any order."""
    pairs: list[tuple[str | None, Any]] = (
        [(str(name), item[name]) for name in sorted(item, key=str)]
        if isinstance(item, Mapping)
        else [(None, value) for value in item]
    )
    return [
        (name, _tensor(name if name is not None else position, value)) for position, (name, value) in enumerate(pairs)
    ]


def _tensor(which: Any, value: Any) -> Tensor:
    try:
        return as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"Input {which} of a dataset's item is a {type(value).__name__}; expected a tensor, an array or a number in"
            " each place: (inputs, target) with inputs a tuple of positional or a mapping of keyword arguments."
        ) from error


def _kind(value: Tensor) -> str:
    return "float32" if value.is_floating_point() else "bool" if value.dtype == torch.bool else "int64"


def _as_float(value: Tensor) -> Tensor:
    if (
        not value.is_floating_point()
        and value.numel()
        and int(value.abs().max() if value.dtype != torch.bool else 0) > MOST
    ):
        raise UserError(
            f"An input of whole numbers holds {int(value.abs().max())}; expected none beyond {MOST:,}, up to which "
            "float32 is exact."
        )
    return value.to(torch.float32)
