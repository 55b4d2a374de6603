"""What known modules do to channel labels, and which of their channels each label owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ..networks.module_kinds import is_depthwise, is_transposed
from ..surgery.filter_group import Axis, Kind
from .channel_labels import ChannelLabels, Ids, per_channel, spread, varying

LAYER_NORM_MIXES = "a LayerNorm mixes its channels, so that removing one changes the others"
BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm")


@dataclass
class Ownership:
    """Labels of every module's channels, in execution order: `ids[module, axis]` has one label per channel."""

    forest: ChannelLabels
    ids: dict[tuple[str, Axis], Ids] = field(default_factory=dict)
    kinds: dict[tuple[str, Axis], Kind] = field(default_factory=dict)
    reads_values: bool = False  # Python looked at the value of an activation: it may choose its path by it

    def own(self, module: str, axis: Axis, kind: Kind, ids: Ids) -> Ids:
        """Note the labels of a module's channels; a module that runs twice ties the labels of both runs."""
        key = (module, axis)
        if key in self.ids:
            self.forest.unite(self.ids[key], ids)
        self.kinds[key] = kind
        return self.ids.setdefault(key, ids)


def apply_module(owners: Ownership, name: str, module: nn.Module, labels: Tensor | None, out: Tensor) -> Tensor | None:
    """Labels of `out = module(input)` given the labels of the input (None: nothing of it can be removed)."""
    if isinstance(module, _ConvNd):
        return _conv(owners, name, module, labels, out)
    if isinstance(module, nn.Linear):
        return _linear(owners, name, module, labels, out)
    if isinstance(module, nn.LayerNorm):
        return _layer_norm(owners, module, labels)
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return labels
    ids = _channel_ids(owners.forest, labels, min(1, out.dim() - 1), out.shape[min(1, out.dim() - 1)])
    if isinstance(module, nn.GroupNorm):
        _tie_norm_groups(owners.forest, module, ids)
    if isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.PReLU)):
        owners.own(name, "out", "pass", ids)
    return spread(ids, min(1, out.dim() - 1), out.shape)


def own_input(module: nn.Module, func: Any, args: Sequence[Any]) -> Any:
    """What the operator call reads if it is that of `module` itself (its kind, its own weight, its groups), or None."""
    name, weight = func.overloadpacket.__name__, module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        source, read = (args[-2], args[-1]) if name in ("addmm", "mm") else (None, None)
        if not isinstance(read, Tensor) or weight is None or read.shape != weight.T.shape:
            return None
        return source if read.data_ptr() == weight.data_ptr() else None
    if len(args) < 2 or args[1] is None or args[1] is not weight:
        return None
    if isinstance(module, _ConvNd):
        fits = name == "convolution" and (args[6], args[8]) == (is_transposed(module), module.groups)
    elif isinstance(module, nn.GroupNorm):
        fits = name == "native_group_norm" and args[6] == module.num_groups
    else:
        fits = name in BATCH_NORMS
    return args[0] if fits else None


def _channel_ids(forest: ChannelLabels, labels: Tensor | None, dim: int, count: int) -> Ids:
    return np.zeros(count, np.int64) if labels is None else per_channel(forest, labels, dim)


def _conv(owners: Ownership, name: str, module: _ConvNd, labels: Tensor | None, out: Tensor) -> Tensor:
    dim = out.dim() - len(module.kernel_size) - 1
    ids_in = _channel_ids(owners.forest, labels, dim, module.in_channels)
    known = owners.ids.get((name, "out"))
    ids_out = owners.forest.new(module.out_channels) if known is None else known
    if is_depthwise(module):
        # The n-th input channel makes `multiplier` neighbouring output channels and nothing else.
        owners.forest.unite(ids_out.reshape(module.in_channels, -1), ids_in[:, None])
        owners.own(name, "out", "pass", ids_out)
        return spread(ids_out, dim, out.shape)
    for ids in (ids_in, ids_out):
        # Grouped: every block must lose equally many channels, so the n-th channels of all blocks go together.
        blocks = ids.reshape(module.groups, -1)
        owners.forest.unite(blocks[1:], blocks[:1])
    owners.own(name, "in", "consumer", ids_in)
    owners.own(name, "out", "producer", ids_out)
    return spread(ids_out, dim, out.shape)


def _linear(owners: Ownership, name: str, module: nn.Linear, labels: Tensor | None, out: Tensor) -> Tensor:
    last = out.dim() - 1
    if labels is not None and varying(labels) and last not in varying(labels) and module.in_features > 1:
        # It works along positions: every channel stays by itself.
        return labels.narrow(last, 0, 1).expand(out.shape)
    owners.own(name, "in", "consumer", _channel_ids(owners.forest, labels, last, module.in_features))
    known = owners.ids.get((name, "out"))
    ids_out = owners.forest.new(module.out_features) if known is None else known
    owners.own(name, "out", "producer", ids_out)
    return spread(ids_out, last, out.shape)


def _layer_norm(owners: Ownership, module: nn.LayerNorm, labels: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    first = labels.dim() - len(module.normalized_shape)
    if any(dim >= first for dim in varying(labels)):
        owners.forest.fix(labels.unique(), LAYER_NORM_MIXES)
        return None
    return labels


def _tie_norm_groups(forest: ChannelLabels, module: nn.GroupNorm, ids: Ids) -> None:
    if module.num_groups == 1 and module.num_channels > 1:
        forest.fix(ids, "a GroupNorm of one group mixes its channels, so that removing one changes the others")
        return
    # Statistics are taken over a whole norm group: it stays or goes as one.
    blocks = ids.reshape(module.num_groups, -1)
    forest.unite(blocks[:, 1:], blocks[:, :1])


def tie_blocks(forest: ChannelLabels, labels: Tensor, dim: int) -> None:
    """Unite the labels along `dim`: what has the same place behind it goes together."""
    small = labels.movedim(dim, 0)
    forest.unite(small[1:].numpy(), small[:1].numpy())
