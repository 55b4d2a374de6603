"""Copies of networks: `copy.deepcopy`, also where an attribute refuses (an activation kept on self, a lock, a file)."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from ...errors import UserError, summarised

NetworkT = TypeVar("NetworkT", bound=nn.Module)
_CONTAINERS = (list, tuple, set, frozenset, Mapping)
# What deepcopy returns as it is, of what modules hold most.
_ATOMS = frozenset(
    (bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device, type, FunctionType, BuiltinFunctionType)
)
# By what a class may take part in its own copies, and what `nn.Module` has there.
_PROTOCOL = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__")


def copied(model: NetworkT) -> NetworkT:
    """A deep copy of `model`, which stays as it is.

    What cannot be copied does not stand in the way: a tensor that autograd made (an activation kept on self, the weight
    that weight norm or a pruning mask makes in each pass) is copied as a plain one, and an object that refuses and
    holds nothing of the network (a Python module, a lock, a file) is shared with the original.

    Raises UserError, which names the attribute, for an object that refuses and holds parts of the network.
    """
    try:
        return _deep(model, {})
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


def _deep(model: NetworkT, memo: dict[int, Any]) -> NetworkT:
    """`copy.deepcopy(model, memo)`; modules, most of what a network holds, without its general way through `pickle`."""
    if id(model) in memo:
        return memo[id(model)]
    kind = type(model)
    if not _is_copied_plainly(model):
        return copy.deepcopy(model, memo)
    made = memo[id(model)] = kind.__new__(kind)
    made.__setstate__({key: _deep_value(value, memo) for key, value in vars(model).items()})
    return made


def _is_copied_plainly(module: nn.Module) -> bool:
    """Whether deepcopy would make an empty module of the class and fill in copies of its attributes."""
    kind = type(module)
    own = any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in _PROTOCOL)
    named = "__deepcopy__" in vars(module) or any(hasattr(kind, each) for each in ("__deepcopy__", "__getnewargs__"))
    more = isinstance(module, (list, dict)) or any(vars(each).get("__slots__") for each in kind.__mro__)
    return not (own or named or more or hasattr(kind, "__getnewargs_ex__") or kind in copyreg.dispatch_table)


def _deep_value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS or (kind is tuple and all(type(each) in _ATOMS for each in value)):
        return value
    if isinstance(value, nn.Module):
        return _deep(value, memo)
    if (kind is dict or kind is OrderedDict) and not getattr(value, "__dict__", None):
        if id(value) not in memo:
            made = memo[id(value)] = kind()
            for key, each in value.items():
                made[_deep_value(key, memo)] = _deep_value(each, memo)
        return memo[id(value)]
    return copy.deepcopy(value, memo)


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
