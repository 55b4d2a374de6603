"""Example inputs of a network: one tensor, a tuple of positional or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .module_kinds import Inputs


def as_call(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `model(...)`."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def batch_size(example_inputs: Inputs) -> int:
    """The first axis of the first tensor; ValueError where there is none."""
    tensors = [value for value in tensors_of(example_inputs) if value.dim() > 0]
    if not tensors:
        raise ValueError("example_inputs holds no tensor with a batch axis.")
    return tensors[0].shape[0]


def tensors_of(example_inputs: Inputs) -> list[Tensor]:
    """The tensors among the arguments, in order."""
    args, kwargs = as_call(example_inputs)
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def mapped(example_inputs: Inputs, change: Callable[[Tensor], Any]) -> Inputs:
    """The same arguments with every tensor changed."""

    def each(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    if isinstance(example_inputs, Tensor):
        return each(example_inputs)
    if isinstance(example_inputs, Mapping):
        return {name: each(value) for name, value in example_inputs.items()}
    return tuple(map(each, example_inputs))


def beside(model: torch.nn.Module, example_inputs: Inputs) -> Inputs:
    """The same arguments on the device of the network."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return mapped(example_inputs, lambda value: value.to(device))


def resized(example_inputs: Inputs, size: int) -> Inputs:
    """Every tensor that has the batch axis, cut or repeated to `size` rows."""
    given = batch_size(example_inputs)

    def resize(value: Tensor) -> Tensor:
        if not is_batch(value, given):
            return value
        return value.repeat(-(-size // given), *[1] * (value.dim() - 1))[:size].contiguous()

    return mapped(example_inputs, resize)


def is_batch(value: Any, size: int) -> bool:
    """Whether an argument is a tensor with one row per image."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size


def tensors_in(outputs: Any) -> list[Tensor]:
    """All tensors that a network returned, in order: of tuples, lists, mappings and objects with attributes."""
    found: list[Tensor] = []
    for value in tree_leaves(outputs):
        if isinstance(value, Tensor):
            found.append(value)
        elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
            found.extend(each for each in tree_leaves(dict(vars(value))) if isinstance(each, Tensor))
    return found
