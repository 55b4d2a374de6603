"""What torch operators do to channel labels. An operator that is not listed fixes the filters that touch it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .channel_labels import ChannelLabels, compact, compress, per_channel, spread, varying
from .module_rules import LAYER_NORM_MIXES, tie_blocks


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SAME = _words(
    """clone _to_copy alias detach detach_ contiguous lift_fresh lift zeros_like ones_like empty_like full_like
    rand_like randn_like native_dropout bernoulli"""
)
# Moved, never mixed: run on the labels themselves.
STRUCTURAL = _words(
    """view _unsafe_view reshape permute transpose t expand squeeze unsqueeze slice select split split_with_sizes unbind
    cat stack flip roll repeat index_select pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle narrow
    movedim unfold chunk flatten unflatten constant_pad_nd"""
)
# Channel by channel, whatever happens within its positions.
SPATIAL = re.compile(
    r"(_?adaptive_)?(max|avg|lp)_pool[123]d(_with_indices)?|mkldnn_(max_pool[23]d|adaptive_avg_pool2d)"
    r"|_?upsample_(nearest(_exact)?|linear|bilinear|bicubic|trilinear)([123]d)?(_aa)?|_upsample_nearest_exact[123]d"
    r"|(reflection|replication)_pad[123]d"
)
REDUCING = _words(
    """mean sum amax amin max min var std var_mean norm linalg_vector_norm prod logsumexp median _softmax softmax
    _log_softmax log_softmax cumsum argmax argmin any all"""
)
# Pointwise, though torch does not tag them so.
POINTWISE = _words("hardswish hardswish_ hardsigmoid hardsigmoid_ hardtanh_ relu6 copy_ copy threshold_ celu_")

Labelled = dict[int, tuple[Tensor, Tensor]]


def apply_operator(forest: ChannelLabels, labelled: Labelled, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Labels of what `func(*args, **kwargs)` returned, in the structure of `out`; None where nothing is labelled.

    `labelled` maps the id of a tensor to the tensor and its labels.
    """
    name = func.overloadpacket.__name__
    inputs = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    known = [labelled[id(value)][1] for value in inputs if id(value) in labelled]
    if not known:
        return None
    if name in SAME:
        return labelled[id(args[0])][1] if id(args[0]) in labelled else None
    if name in STRUCTURAL:
        return _structural(forest, labelled, func, name, args, kwargs)
    if SPATIAL.fullmatch(name):
        return _spatial(forest, name, known[0], out)
    if name in REDUCING and len(known) == 1 and len(inputs) == 1:
        return _reduce(forest, name, known[0], args, kwargs, out)
    if (torch.Tag.pointwise in func.tags or name in POINTWISE) and isinstance(out, Tensor):
        return pointwise(forest, inputs, [labelled.get(id(value), (value, None))[1] for value in inputs], out, name)
    if name == "native_layer_norm":
        fix_all(forest, known, LAYER_NORM_MIXES)
        return None
    fix_all(forest, known, f"the operation {name!r} is not one that keeps channels apart")
    return None


def fix_all(forest: ChannelLabels, known: Sequence[Tensor], reason: str) -> None:
    """Every filter seen in these labels must stay."""
    for labels in known:
        forest.fix(compact(labels).unique(), reason)


def pointwise(
    forest: ChannelLabels, inputs: Sequence[Tensor], labels: Sequence[Tensor | None], out: Tensor, name: str
) -> Tensor:
    """Elements that meet go together; an operand spread over the channels of another ties nothing, but must stay."""
    rank = out.dim()
    wide = [None if each is None else each.view(_aligned(each, rank)) for each in labels]
    dims = {dim for each in wide if each is not None for dim in varying(each)}
    result: Tensor | None = None
    for value, each in zip(inputs, wide, strict=True):
        shape = _aligned(value, rank)
        if any(shape[dim] == 1 and out.shape[dim] > 1 for dim in dims) or (each is None and value.dim() == 0):
            if each is not None:
                forest.fix(compact(each).unique(), f"{name!r} spreads it over the channels of another")
            continue
        part = compact(each) if each is not None else torch.zeros([1] * rank, dtype=torch.int64)
        if result is not None:
            forest.unite(*torch.broadcast_tensors(result, part))
            result = torch.where(result != 0, result, part)
        else:
            result = part
    assert result is not None
    return result.expand(out.shape)


def _aligned(value: Tensor, rank: int) -> list[int]:
    return [1] * (rank - value.dim()) + list(value.shape)


def _structural(forest: ChannelLabels, labelled: Labelled, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    def to_labels(value: Tensor) -> Tensor:
        if id(value) in labelled:
            return labelled[id(value)][1]
        return torch.zeros(value.shape, dtype=torch.int64) if value.is_floating_point() else value

    source = labelled[id(args[0])][1] if id(args[0]) in labelled else None
    if name == "constant_pad_nd" and source is not None:
        return _pad(source, args[1])
    if source is not None and name in ("view", "_unsafe_view", "reshape"):
        return _reshape(forest, source, args[1])
    moved_args, moved_kwargs = tree_map_only(Tensor, to_labels, (args, kwargs))
    moved = func(*moved_args, **moved_kwargs)
    if name in ("split", "split_with_sizes", "chunk") and len({part.shape for part in moved}) == 1:
        _tie_parts(forest, moved)
    return tree_map_only(Tensor, compress, moved)


def _reshape(forest: ChannelLabels, labels: Tensor, shape: Sequence[int]) -> Tensor:
    """A view that splits the channels into blocks ties the n-th channels of all blocks (channel shuffle)."""
    before = len(varying(labels))
    moved = compress(labels.reshape(list(shape)))
    split = varying(moved)
    if len(split) > before:
        for dim in split[: len(split) - before]:
            tie_blocks(forest, compact(moved), dim)
    return moved


def _tie_parts(forest: ChannelLabels, parts: Sequence[Tensor]) -> None:
    """Equal parts of one tensor stay equal: the n-th channels of all parts go together.

    Parts that were cut along positions carry the same labels, and nothing is tied.
    """
    for part in parts[1:]:
        forest.unite(parts[0], part)


def _pad(labels: Tensor, padding: Sequence[int]) -> Tensor:
    """Zeros around a channel's positions belong to the channel; whole channels of zeros have label 0."""
    for back, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        dim = labels.dim() - 1 - back
        size = labels.shape[dim]
        place = torch.arange(-before, size + after)
        moved = labels.index_select(dim, place.clamp(0, size - 1))
        if dim in varying(labels):
            outside = ((place < 0) | (place >= size)).view([-1 if each == dim else 1 for each in range(labels.dim())])
            moved = moved.masked_fill(outside, 0)
        labels = compress(moved)
    return labels


def _spatial(forest: ChannelLabels, name: str, labels: Tensor, out: Any) -> Any:
    first = out if isinstance(out, Tensor) else out[0]
    found = re.search(r"([123])d", name)
    dim = first.dim() - int(found.group(1)) - 1 if found else 1
    result = spread(per_channel(forest, labels, dim), dim, first.shape)
    return result if isinstance(out, Tensor) else [result] + [None] * (len(out) - 1)


def _reduce(forest: ChannelLabels, name: str, labels: Tensor, args: Any, kwargs: Any, out: Any) -> Any:
    """Reduced along positions a channel stays itself; reduced along channels they are mixed and must stay."""
    given = kwargs.get("dim", next((value for value in args[1:] if isinstance(value, (int, list, tuple))), None))
    if "norm" in name and "dim" not in kwargs:
        given = args[2] if len(args) > 2 else None
    given = [given] if isinstance(given, int) else given
    dims = {dim % labels.dim() for dim in given} if given else set(range(labels.dim()))
    if dims & set(varying(labels)):
        fix_all(forest, [labels], f"the operation {name!r} mixes its channels")
        return None
    first = out if isinstance(out, Tensor) else out[0]
    keeps = first.dim() == labels.dim()
    for dim in sorted(dims, reverse=True):
        labels = labels.narrow(dim, 0, 1) if keeps else labels.select(dim, 0)
    result = labels.expand(first.shape)
    return result if isinstance(out, Tensor) else [result] * len(out)
