"""Weights held in parts, in networks and in files: masks of `torch.nn.utils.prune`, weight norm, spectral norm."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from .modes import evaluating

_REMOVERS: dict[type, Any] = {SpectralNorm: remove_spectral_norm, WeightNorm: remove_weight_norm}
_NORMS = (parametrizations._SpectralNorm, parametrizations._WeightNorm)
_NORMALISED = re.compile(r"(.*?)\.?(weight_g|weight_orig|parametrizations\.\w+\.original0?)")
_PARTS = re.compile(r"(?P<stem>.*?(parametrizations\.\w+\.|\w+))(original0?|_orig|_g)")


def make_masks_permanent(network: nn.Module) -> list[str]:
    """Make the masks of `torch.nn.utils.prune` permanent, in place; returns the names of the masked tensors."""
    found = []
    for name, module in network.named_modules():
        hooks = list(module._forward_pre_hooks.values())
        for hook in hooks:
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
                found.append(f"{name}.{hook._tensor_name}".lstrip("."))
    return found


def fold_norms(network: nn.Module, kept: Collection[str]) -> list[str]:
    """Make the weights of torch's weight norm and spectral norm permanent, in place; returns their modules' names.

    Both look at all of a weight, so that no input of it could be cut without changing what is left.
    """
    found = []
    for name, module in [each for each in network.named_modules() if each[0] not in kept]:
        hooks = [hook for hook in module._forward_pre_hooks.values() if type(hook) in _REMOVERS]
        made = _norms_of(module)
        with evaluating(module):  # training would move the vectors of a spectral norm
            for hook in hooks:
                trained = any(module._parameters[hook.name + end].requires_grad for end in _ends(module, hook.name))
                _REMOVERS[type(hook)](module, hook.name)
                module.get_parameter(hook.name).requires_grad_(trained)
                _forget_loading(module)
            _unparametrise(module, made)
        found += [name] if hooks or made else []
    return found


def _ends(module: nn.Module, name: str) -> list[str]:
    """Suffixes of the parameters from which a hook makes the tensor `name`."""
    return [end for end in ("_orig", "_g", "_v") if name + end in module._parameters]


def _norms_of(module: nn.Module) -> list[str]:
    """Tensors that torch's weight norm or spectral norm alone makes."""
    if not parametrize.is_parametrized(module):
        return []
    made: Any = module.parametrizations
    return [name for name, steps in made.items() if all(isinstance(step, _NORMS) for step in steps)]


def _unparametrise(module: nn.Module, made: Iterable[str]) -> None:
    """`parametrize.remove_parametrizations`; copies of the module, and frozen tensors, stay what they are."""
    kind = type(module)
    for name in made:
        if type(module) is kind:  # torch takes a property off the class, which copies share
            own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, own)
        with torch.enable_grad():
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        if name in module._buffers:  # torch's idea of a frozen parameter
            value = module.get_buffer(name)
            del module._buffers[name]
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _forget_loading(module: nn.Module) -> None:
    """Take off the hook that still asks for a spectral norm's tensors: torch wraps it and then misses it."""
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del module._load_state_dict_pre_hooks[key]


def normalised_in(tensors: Iterable[str]) -> set[str]:
    """The modules whose tensors in a file, by these names, are what weight norm or spectral norm starts from."""
    return {found.group(1) for name in tensors if (found := _NORMALISED.fullmatch(name))}


def made_whole(state: dict[str, Tensor], ours: Collection[str]) -> dict[str, Tensor]:
    """Weights that a file holds in parts, made: masked ones, and what weight norm and spectral norm make.

    Of both norms the older form (`weight_orig`) and that of parametrizations. A model that holds parts itself gets
    them as they are.
    """
    if any(_PARTS.fullmatch(name) for name in ours):
        return state
    found = dict(state)
    for name in state:
        match = _PARTS.fullmatch(name)
        if match is None:
            continue
        for first, *rest, make in _MAKERS:
            names = [match["stem"] + part for part in (first, *rest)]
            if name == names[0] and all(each in found for each in names):
                whole = match["stem"].replace("parametrizations.", "").removesuffix(".")
                found[whole] = make(*(found.pop(each) for each in names))
                break
    return found


def _weight_normed(length: Tensor, direction: Tensor) -> Tensor:
    """Weight norm: `length` says by its sides which of the weight's dimensions have one each."""
    dims = [dim for dim in range(direction.dim()) if length.dim() == 0 or length.shape[dim] == 1]
    return direction * (length / torch.linalg.vector_norm(direction, dim=dims, keepdim=True))


def _spectral_normed(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Spectral norm, by its stored vectors; of a transposed convolution they belong to the second dimension."""
    matrices = (weight.movedim(dim, 0).flatten(1) for dim in (0, 1))
    sizes = (len(left), len(right))
    # Vectors that have converged give the largest value for the dimension that they belong to.
    return weight / max(torch.dot(left, matrix @ right) for matrix in matrices if tuple(matrix.shape) == sizes)


_MAKERS: tuple[tuple[Any, ...], ...] = (
    ("_orig", "_mask", torch.mul),
    ("_orig", "_u", "_v", _spectral_normed),
    ("_g", "_v", _weight_normed),
    ("original0", "original1", _weight_normed),
    ("original", "0._u", "0._v", _spectral_normed),
)
