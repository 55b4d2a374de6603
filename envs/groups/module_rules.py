"""What known modules do to channel labels, and which of their channels each label owns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ..networks.module_kinds import is_attention, is_depthwise, is_extended, is_leaf, is_recurrent, is_transposed
from ..surgery.filter_group import Axis, Kind
from ..surgery.slicing import tensor_axis, width
from .channel_labels import ChannelLabels, Ids, compact, per_channel, spread, varying

LAYER_NORM_MIXES = "a LayerNorm mixes its channels, so that removing one changes the others"
READS_STEPS = "a recurrent layer reads its channels as steps"
STATE = "its filters are the first state of a recurrent layer"
ATTENTION = "a MultiheadAttention makes as many channels as it reads, so that it cannot read fewer"
BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm")


@dataclass
class Ownership:
    """Labels of every module's channels, in execution order: `ids[module, axis]` has one label per channel."""

    forest: ChannelLabels
    ids: dict[tuple[str, Axis], Ids] = field(default_factory=dict)
    kinds: dict[tuple[str, Axis], Kind] = field(default_factory=dict)
    reads_values: bool = False  # Python looked at the value of an activation: it may choose its path by it
    at_positions: set[str] = field(default_factory=set)  # linear layers that run at several positions of an image
    held: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # labels of held tensors (`label_held`)
    places: list[tuple[str, Axis, Ids]] = field(default_factory=list)  # where those are held
    made: dict[str, Ids] = field(default_factory=dict)  # labels of the filters of convolutions that make their weight
    draws: tuple[str, ...] = ()  # operators that draw random numbers in evaluation mode
    training_only: set[str] = field(default_factory=set)  # modules that run in training mode alone
    trained: list[tuple[int, ...]] | None = None  # shapes of the answer to two images in training mode
    why_not_trained: str | None = None  # what stands in the way of a pass in training mode

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
    if is_recurrent(module):
        _recurrent(owners, name, module, labels)
        return None
    if is_attention(module):
        fix_all(owners.forest, [labels], ATTENTION)
        return None
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return labels
    ids = channel_ids(owners.forest, labels, min(1, out.dim() - 1), out.shape[min(1, out.dim() - 1)])
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


def channel_ids(forest: ChannelLabels, labels: Tensor | None, dim: int, count: int) -> Ids:
    """One label for each of the `count` channels along `dim`; 0 where nothing is labelled."""
    return np.zeros(count, np.int64) if labels is None else per_channel(forest, labels, dim)


def own_weight(module: nn.Module, func: Any, args: Sequence[Any]) -> Tensor | None:
    """The weight of the operator call if it is the one convolution of `module`, whatever its weight was made from."""
    if not isinstance(module, _ConvNd) or func.overloadpacket.__name__ != "convolution":
        return None
    fits = (args[6], args[8]) == (is_transposed(module), module.groups) and not is_transposed(module)
    weight = args[1]
    return weight if fits and isinstance(weight, Tensor) and len(weight) == module.out_channels else None


def apply_made_conv(
    owners: Ownership, name: str, module: _ConvNd, labels: Tensor | None, made: Sequence[Tensor | None], out: Tensor
) -> Tensor:
    """Labels of the output of a convolution whose class makes weight and bias out of what it holds, filter by filter.

    Args:
        made: labels of the weight as it was made, which differ along its first dimension alone, and of the bias.

    The filters can go one by one; of what they read nothing can, since each weight may depend on all of a filter.
    """
    dim = out.dim() - len(module.kernel_size) - 1
    ids_in = channel_ids(owners.forest, labels, dim, module.in_channels)
    assert made[0] is not None
    ids_out = per_channel(owners.forest, made[0], 0)
    for each in (owners.made.get(name), None if made[1] is None else per_channel(owners.forest, made[1], 0)):
        if each is not None:
            owners.forest.unite(ids_out, each)
    if is_depthwise(module):
        owners.forest.unite(ids_out.reshape(module.in_channels, -1), ids_in[:, None])
        owners.own(name, "out", "pass", ids_out)
        return spread(ids_out, dim, out.shape)
    owners.forest.fix(ids_in, f"{type(module).__name__}, which reads it, makes its weight out of all of a filter")
    blocks = ids_out.reshape(module.groups, -1)
    owners.forest.unite(blocks[1:], blocks[:1])
    owners.own(name, "out", "producer", ids_out)
    return spread(ids_out, dim, out.shape)


def _conv(owners: Ownership, name: str, module: _ConvNd, labels: Tensor | None, out: Tensor) -> Tensor:
    dim = out.dim() - len(module.kernel_size) - 1
    ids_in = channel_ids(owners.forest, labels, dim, module.in_channels)
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
    if out.dim() > 2:
        owners.at_positions.add(name)
    owners.own(name, "in", "consumer", channel_ids(owners.forest, labels, last, module.in_features))
    known = owners.ids.get((name, "out"))
    ids_out = owners.forest.new(module.out_features) if known is None else known
    owners.own(name, "out", "producer", ids_out)
    return spread(ids_out, last, out.shape)


def _recurrent(owners: Ownership, name: str, module: nn.Module, labels: Tensor | None) -> None:
    """The input's weights are read column by column; what the layer makes depends on all of its state."""
    last = 0 if labels is None else labels.dim() - 1
    if labels is not None and any(dim != last for dim in varying(labels)):
        fix_all(owners.forest, [labels], READS_STEPS)
        labels = None
    owners.own(name, "in", "consumer", channel_ids(owners.forest, labels, last, width(module, "in")))


def _layer_norm(owners: Ownership, module: nn.LayerNorm, labels: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    first = labels.dim() - len(module.normalized_shape)
    if any(dim >= first for dim in varying(labels)):
        fix_all(owners.forest, [labels], LAYER_NORM_MIXES)
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


def fix_all(forest: ChannelLabels, known: Iterable[Tensor | None], reason: str) -> None:
    """Every filter seen in these labels must stay."""
    for labels in known:
        if labels is not None:
            forest.fix(compact(labels).unique(), reason)


def label_held(owners: Ownership, model: nn.Module) -> None:
    """Label the tensors that modules hold besides the weights of known layers.

    Parameters, buffers and plain attributes: scales and shifts of one number per channel, frozen statistics, weights
    from which a convolution makes its own. Each gets labels of its own along the dimension that may be channels, which
    are tied to those of the activation that it meets. A tensor held twice gets none: cutting it in one place would
    leave the other as it was.
    """
    found: dict[int, list[tuple[str, str, Tensor]]] = {}
    for name, module in model.named_modules():
        for key, value in _held_by(module).items():
            found.setdefault(id(value), []).append((name, key, value))
    for name, key, value in (places[0] for places in found.values() if len(places) == 1):
        module, dim = model.get_submodule(name), _channel_dim_of(name, value)
        if is_extended(module) and key in ("weight", "bias"):
            if not isinstance(module, _ConvNd) or is_transposed(module):
                continue
            ids, dim = owners.made.setdefault(name, owners.forest.new(module.out_channels)), 0
        else:
            ids = owners.forest.new(value.shape[dim])
            owners.places.append((name, tensor_axis(key, dim), ids))
        owners.held[id(value)] = (value, spread(ids, dim, value.shape))


def own_held(owners: Ownership) -> None:
    """Note the labels of single tensors, behind those of the modules, once the network has run."""
    for name, axis, ids in owners.places:
        owners.own(name, axis, "pass", ids)


def _held_by(module: nn.Module) -> dict[str, Tensor]:
    if is_recurrent(module) or is_attention(module):
        return {}
    known = ("weight", "bias", "running_mean", "running_var") if is_leaf(module) else ()
    held = {**vars(module), **module._parameters, **module._buffers}
    return {
        key: value
        for key, value in held.items()
        if isinstance(value, Tensor) and key not in known and value.is_floating_point() and value.numel() > 1
    }


def _channel_dim_of(name: str, value: Tensor) -> int:
    """The dimension of a held tensor that holds its channels, if it has any: verification tells a wrong guess.

    The one that is longer than 1; of several the first, and the last of tables (positions, channels).
    """
    long = [dim for dim in range(value.dim()) if value.shape[dim] > 1]
    table = value.dim() == 2 or (value.dim() == 3 and value.shape[0] == 1)
    return long[-1] if table and ".parametrizations." not in f".{name}." else long[0]
