"""Copies of networks: `copy.deepcopy`, also where an attribute refuses (an activation kept on self, a lock, a file)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from ...errors import UserError, summarised

NetworkT = TypeVar("NetworkT", bound=nn.Module)
_CONTAINERS = (list, tuple, set, frozenset, Mapping)


def copied(model: NetworkT) -> NetworkT:
    """A deep copy of `model`, which stays as it is.

    What cannot be copied does not stand in the way: a tensor that autograd made (an activation kept on self, the weight
    that weight norm or a pruning mask makes in each pass) is copied as a plain one, and an object that refuses and
    holds nothing of the network (a Python module, a lock, a file) is shared with the original.

    Raises UserError, which names the attribute, for an object that refuses and holds parts of the network.
    """
    try:
        return copy.deepcopy(model)
    except Exception:
        memo = _eased(model)
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception as error:
        name, value = _culprit(model, memo)
        raise UserError(
            f"The network cannot be copied: its attribute {name!r} ({type(value).__name__}) holds parts of the network "
            f"and refuses copy.deepcopy ({summarised(error)}); take it off before pruning: del model.{name}."
        ) from error


def _eased(model: nn.Module) -> dict[int, Any]:
    """What deepcopy has to take, by id, in place of copies of what refuses."""
    memo: dict[int, Any] = {}
    seen: set[int] = set()
    for _, value in _attributes(model):
        _ease(value, memo, seen)
    return memo


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything that the modules hold, by qualified name; buffers among it, submodules and parameters not."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_modules", "_parameters"):
                yield ".".join(filter(None, (name, key))), value


def _ease(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    if id(value) in seen or isinstance(value, nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, UninitializedBuffer):  # of a lazy module, and without a copy of its own
        kind: Any = UninitializedBuffer  # torch's stubs know another constructor
        memo[id(value)] = kind(False, value.device, value.dtype)
    elif isinstance(value, Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, torch.Generator):
        memo[id(value)] = value.clone_state()
    elif isinstance(value, _CONTAINERS) or _holds_network(value):
        for part in _parts(value):
            _ease(part, memo, seen)
    elif not _can_be_copied(value, memo):
        memo[id(value)] = value


def _can_be_copied(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))  # a memo of its own: this copy is thrown away
    except Exception:
        return False
    return True


def _parts(value: Any) -> list[Any]:
    """What a container, or an object of a plain class, holds."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, _CONTAINERS):
        return list(value)
    return [] if isinstance(value, type) or _is_built_in(value) else list(getattr(value, "__dict__", {}).values())


def _is_built_in(value: Any) -> bool:
    """Python modules among them: what stands in one is not walked through."""
    return type(value).__module__ == "builtins"


def _holds_network(value: Any) -> bool:
    """Whether what an object holds leads to modules or tensors."""
    stack, seen = [value], set()
    while stack:
        each = stack.pop()
        if isinstance(each, (nn.Module, Tensor)):
            return True
        if id(each) not in seen:
            seen.add(id(each))
            stack.extend(_parts(each))
    return False


def _culprit(model: nn.Module, memo: dict[int, Any]) -> tuple[str, Any]:
    """The attribute that still refuses, by qualified name; the network itself where none does so alone."""
    for name, value in _attributes(model):
        if not _can_be_copied(value, memo):
            return name, value
    return type(model).__name__, model
