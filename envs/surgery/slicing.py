"""Slicing: takes channels out of single modules; the only place where weights are sliced.

Every list of channels is checked here, whoever made it: whole numbers, sorted, distinct, within range, not empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from ...errors import UserError
from ..networks.module_kinds import is_depthwise, is_recurrent, is_transposed, reading_weights

Rows = NDArray[np.int64]


def tensor_axis(name: str, dim: int) -> str:
    """The axis that is dimension `dim` of the tensor a module holds under `name`."""
    return f"{name}:{dim}"


def is_tensor_axis(axis: str) -> bool:
    """Whether `axis` is a dimension of one tensor, not of the whole module."""
    return ":" in axis


def width(module: nn.Module, axis: str) -> int:
    """Number of channels of `module` on an axis; UserError if it has none that can be cut."""
    if is_tensor_axis(axis):
        name, dim = _tensor_at(module, axis)
        return int(getattr(module, name).shape[dim])
    names = {"out": ("out_channels", "out_features", "num_features", "num_channels", "num_parameters")}.get(
        axis, ("in_channels", "in_features", "input_size")
    )
    for name in names:
        if hasattr(module, name):
            return int(getattr(module, name))
    raise UserError(f"A {type(module).__name__} has no {axis!r} channels that can be cut.")


def checked_rows(name: str, module: nn.Module, axis: str, rows: Sequence[int] | Rows) -> Rows:
    """Kept channels as a sorted int64 array; UserError for anything that is not a proper choice of them."""
    total = width(module, axis)
    try:
        array = np.asarray(rows)
    except (ValueError, TypeError, OverflowError):
        array = np.asarray([None])
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UserError(f"The {axis!r} channels of {name!r} must be a flat list of whole numbers.")
    if array.size == 0:
        raise UserError(f"No {axis!r} channel of {name!r} would be left; keep at least one of {total}.")
    array = array.astype(np.int64)
    if array.min() < 0 or array.max() >= total:
        raise UserError(
            f"The {axis!r} channels of {name!r} must lie between 0 and {total - 1}, got {array.min()} to {array.max()}."
        )
    if (np.diff(array) <= 0).any():
        raise UserError(
            f"The {axis!r} channels of {name!r} must be distinct and ascending, got {array[:8].tolist()}..."
        )
    return array


def slice_module(name: str, module: nn.Module, out: Rows | None, into: Rows | None) -> None:
    """Keep only these channels of `module`, in place; None for an axis that it does not have."""
    if is_recurrent(module):
        assert into is not None and isinstance(module, nn.RNNBase | nn.RNNCellBase)
        for each in reading_weights(module):
            weight = getattr(module, each)
            _replace(module, each, weight[:, _on(into, weight)])
        module.input_size = len(into)
        return
    assert out is not None
    if is_depthwise(module):
        assert isinstance(module, _ConvNd)
        _slice_depthwise(name, module, out)
    elif isinstance(module, _ConvNd):
        assert into is not None
        _slice_conv(name, module, out, into)
    elif isinstance(module, nn.Linear):
        assert into is not None
        _replace(module, "weight", module.weight[_on(out, module.weight)][:, _on(into, module.weight)])
        _keep_rows(module, ("bias",), out)
        module.out_features, module.in_features = len(out), len(into)
    elif isinstance(module, (_BatchNorm, _InstanceNorm)):
        _keep_rows(module, ("weight", "bias", "running_mean", "running_var"), out)
        module.num_features = len(out)
    elif isinstance(module, nn.GroupNorm):
        _slice_group_norm(name, module, out)
    elif isinstance(module, nn.PReLU):
        _keep_rows(module, ("weight",), out)
        module.num_parameters = len(out)
    else:
        raise UserError(f"Module {name!r} is a {type(module).__name__}, which cannot be cut.")


def slice_axes(name: str, module: nn.Module, axes: Mapping[str, Sequence[int] | Rows]) -> None:
    """Keep only these channels of `module`, in place, and all on an axis that is not given; the lists are checked."""
    rows = {
        axis: checked_rows(name, module, axis, axes.get(axis, np.arange(width(module, axis))))
        for axis in axes_of(module)
    }
    slice_module(name, module, rows.get("out"), rows.get("in"))


def slice_tensor(module: nn.Module, axis: str, rows: Rows) -> None:
    """Keep only these places of one tensor (`tensor_axis`) that `module` holds, in place."""
    name, dim = _tensor_at(module, axis)
    value = getattr(module, name)
    _replace(module, name, value.index_select(dim, _on(rows, value)))


def axes_of(module: nn.Module) -> tuple[str, ...]:
    """The axes of the module as a whole; a depthwise convolution's inputs follow from its outputs."""
    if is_recurrent(module):
        return ("in",)
    both = isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and not is_depthwise(module))
    return ("out", "in") if both else ("out",)


def axes_of_parameter(module: nn.Module, name: str) -> tuple[str, ...]:
    """Along which axes of the module as a whole its parameter `name` is cut."""
    if is_recurrent(module):
        return ("in",) if name in reading_weights(module) else ()
    if name == "weight":
        return axes_of(module)
    return ("out",) if name == "bias" else ()


def _tensor_at(module: nn.Module, axis: str) -> tuple[str, int]:
    name, _, dim = axis.rpartition(":")
    value = {**vars(module), **module._parameters, **module._buffers}.get(name)
    if not isinstance(value, Tensor) or not dim.isdecimal() or int(dim) >= value.dim():
        raise UserError(f"A {type(module).__name__} holds no tensor for {axis!r} that can be cut.")
    return name, int(dim)


def _slice_conv(name: str, module: _ConvNd, out: Rows, into: Rows) -> None:
    outs, ins = (
        _blocks(name, out, module.out_channels, module.groups),
        _blocks(name, into, module.in_channels, module.groups),
    )
    # A block that reads nothing and makes nothing is gone; one that only reads or only makes cannot be.
    if any((len(o) == 0) != (len(i) == 0) for o, i in zip(outs, ins, strict=True)):
        raise UserError(f"A block of the grouped convolution {name!r} would lose all of one side only.")
    outs, ins = [each for each in outs if len(each)], [each for each in ins if len(each)]
    if len({len(each) for each in outs}) > 1 or len({len(each) for each in ins}) > 1:
        raise UserError(f"The blocks of the grouped convolution {name!r} must lose equally many channels.")
    if not parametrize.is_parametrized(module, "weight"):
        weight = module.weight
        first, second = (ins, outs) if is_transposed(module) else (outs, ins)
        width_second = weight.shape[1]
        parts = [weight[_on(a, weight)][:, _on(b % width_second, weight)] for a, b in zip(first, second, strict=True)]
        _replace(module, "weight", torch.cat(parts) if len(parts) > 1 else parts[0])
    _keep_rows(module, ("bias",), out)
    module.out_channels, module.in_channels, module.groups = len(out), len(into), len(outs)


def _slice_depthwise(name: str, module: _ConvNd, out: Rows) -> None:
    multiplier = module.out_channels // module.in_channels
    sizes = np.bincount(out // multiplier, minlength=module.in_channels)
    if not set(sizes.tolist()) <= {0, multiplier}:
        raise UserError(f"The {multiplier} filters of one channel of the depthwise {name!r} can only go together.")
    kept = int((sizes > 0).sum())
    rows = np.flatnonzero(sizes) if is_transposed(module) else out
    if not parametrize.is_parametrized(module, "weight"):
        _replace(module, "weight", module.weight[_on(rows, module.weight)])
    _keep_rows(module, ("bias",), out)
    module.out_channels, module.in_channels, module.groups = len(out), kept, kept


def _slice_group_norm(name: str, module: nn.GroupNorm, out: Rows) -> None:
    size = module.num_channels // module.num_groups
    kept = np.bincount(out // size, minlength=module.num_groups)
    if not set(kept.tolist()) <= {0, size}:
        raise UserError(f"The {size} channels of one group of the GroupNorm {name!r} can only go together.")
    _keep_rows(module, ("weight", "bias"), out)
    module.num_channels, module.num_groups = len(out), int((kept > 0).sum())


def _blocks(name: str, rows: Rows, total: int, groups: int) -> list[Rows]:
    size = total // groups
    return [rows[rows // size == block] for block in range(groups)]


def _on(rows: Rows, like: Tensor) -> Tensor:
    return torch.from_numpy(np.array(rows)).to(like.device)


def _keep_rows(module: nn.Module, names: Sequence[str], rows: Rows) -> None:
    for name in names:
        value = getattr(module, name, None)
        if value is not None:
            _replace(module, name, value[_on(rows, value)])


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    value = value.detach().clone()
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        setattr(module, name, value)
