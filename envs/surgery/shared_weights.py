"""Shared weights: one parameter in several layers (tied weights), found before a cut and tied again behind it."""

from __future__ import annotations

import torch
from torch import nn

SHARES = "shares its weight with another layer, which would change with it"

Place = tuple[str, str]
"""Name of a module, name of its parameter."""


def shared_parameters(model: nn.Module) -> list[list[Place]]:
    """Where each parameter stands that several modules hold; a module under several names counts once."""
    found: dict[int, list[Place]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((name, key))
    return [places for places in found.values() if len(places) > 1]


def sharing_modules(model: nn.Module) -> set[str]:
    """Modules one of whose parameters is another module's too: what is written into one changes the other."""
    return {name for places in shared_parameters(model) for name, _ in places}


def tie_again(model: nn.Module, shared: list[list[Place]]) -> None:
    """Make places one parameter again that a cut has left with equal values, in place."""
    for (first, key), *others in shared:
        parameter = model.get_submodule(first)._parameters[key]
        for name, other_key in others:
            module = model.get_submodule(name)
            other = module._parameters[other_key]
            if parameter is None or other is None or other is parameter or other.shape != parameter.shape:
                continue
            if not parameter.is_meta and torch.equal(other, parameter):
                module._parameters[other_key] = parameter
