"""What torch operators do to channel labels. An operator that is not listed fixes the filters that touch it."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .channel_labels import (
    BLANK,
    MEETS_FIXED,
    ChannelLabels,
    combined,
    compact,
    compress,
    per_channel,
    spread,
    varying,
)
from .module_rules import BATCH_NORMS, LAYER_NORM_MIXES, channel_ids, fix_all, tie_blocks


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


SAME = words(
    """clone _to_copy alias detach detach_ contiguous lift_fresh lift zeros_like ones_like empty_like full_like
    rand_like randn_like native_dropout bernoulli"""
)
# Made from nothing but a size (and a value, or random numbers).
CONSTRUCTORS = words(
    """zeros ones full empty new_zeros new_ones new_full new_empty rand randn randint normal empty_strided
    new_empty_strided"""
)
# Moved, never mixed: run on the labels themselves.
STRUCTURAL = words(
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
# Each channel goes where its own channel of a pooling before it was largest.
UNPOOLING = words("max_unpool2d max_unpool3d")
REDUCING = words(
    """mean sum amax amin max min var std var_mean norm linalg_vector_norm prod logsumexp median _softmax softmax
    _log_softmax log_softmax cumsum argmax argmin any all"""
)
# Pointwise, though torch does not tag them so.
POINTWISE = words(
    "hardswish hardswish_ hardsigmoid hardsigmoid_ hardtanh_ relu6 copy_ copy threshold_ celu_ _prelu_kernel"
)

HARD_SIZE = (
    "a tensor made by zeros, ones, full or a random generator meets its channels: sized by the data, as "
    "torch.zeros_like(x) is, it would follow them"
)

# Of operators that mix channels, by a part of their name.
REASONS = {
    "layer_norm": LAYER_NORM_MIXES,
    "group_norm": "the number of groups of a GroupNorm written by hand stays as it is",
    "attention": "attention compares all channels of a head",
}
FILLED_UP = (
    "what stands beside its channels may fill them up to a fixed number: a fixed number of zeros would follow the cut"
)

Labelled = dict[int, tuple[Tensor, Tensor]]


def apply_operator(
    forest: ChannelLabels, labelled: Labelled, data: Container[int], func: Any, args: Any, kwargs: Any, out: Any
) -> Any:
    """Labels of what `func(*args, **kwargs)` returned, in the structure of `out`; None where nothing is labelled.

    `labelled` maps the id of a tensor to the tensor and its labels, `data` has the ids of those that depend on the
    network's input.
    """
    name = func.overloadpacket.__name__
    if name in CONSTRUCTORS:
        return _constructed(labelled, args, out)
    inputs = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    operands = [_labels_of(labelled, value) for value in inputs]
    known = [labels for labels in operands if labels is not None]
    if not known:
        return None
    if name in SAME or _redraws(func, args, out):
        labels = _labels_of(labelled, args[0])
        return labels if isinstance(out, Tensor) else [labels] * len(out)
    if name in STRUCTURAL:
        moved = _structural(forest, labelled, func, name, args, kwargs)
        return _joined(forest, moved, labelled, data, args) if name == "cat" else moved
    if SPATIAL.fullmatch(name):
        return _spatial(forest, name, known[0], out)
    if name in UNPOOLING:
        return _unpooled(forest, operands[:2], name, out)
    if name in REDUCING and len(known) == 1 and len(inputs) == 1:
        return _reduce(forest, name, known[0], args, kwargs, out)
    if (torch.Tag.pointwise in func.tags or name in POINTWISE) and isinstance(out, Tensor):
        return pointwise(forest, inputs, operands, [id(value) in data for value in inputs], out, name)
    if name in BATCH_NORMS:
        return _batch_norm(forest, labelled, inputs, out)
    if name == "_weight_norm_interface" and args[2:] in ((), (0,)):
        return _weight_norm(forest, labelled, args, out)
    if name == "embedding" and (table := _labels_of(labelled, args[0])) is not None:
        return spread(per_channel(forest, table, 1), out.dim() - 1, out.shape)
    if name in ("bmm", "mm") and (kept := _product(operands, out)) is not None:
        return kept
    reason = f"the operation {name!r} is not one that keeps channels apart"
    fix_all(forest, known, next((why for part, why in REASONS.items() if part in name), reason))
    return None


def _labels_of(labelled: Labelled, value: Any) -> Tensor | None:
    return labelled[id(value)][1] if id(value) in labelled else None


def of_first(result: Tensor | None, out: Any) -> Any:
    """Labels in the structure of `out`: `result` are those of its first tensor, others have none."""
    return result if isinstance(out, Tensor) else [result] + [None] * (len(out) - 1)


def _product(operands: Sequence[Tensor | None], out: Tensor) -> Tensor | None:
    """Matrices multiplied along positions leave the channels of the one apart (the values of an attention of one head).

    None where that is not so: of several heads, and where channels are summed over.
    """
    (left, right), rows, columns = operands, out.dim() - 2, out.dim() - 1
    kept, own, summed = (left, rows, columns) if right is None else (right, columns, rows)
    if kept is None or (left is not None and right is not None) or varying(kept) != [own]:
        return None
    return kept.narrow(summed, 0, 1).expand(out.shape)


def _batch_norm(forest: ChannelLabels, labelled: Labelled, inputs: Sequence[Tensor], out: Any) -> Any:
    """Written by hand: channel by channel, whether its statistics are frozen or those of the batch."""
    source, *vectors = inputs
    ids = channel_ids(forest, _labels_of(labelled, source), 1, source.shape[1])
    for value in vectors:
        labels = _labels_of(labelled, value)
        forest.unite(ids, np.zeros(1, np.int64) if labels is None else labels)
    return of_first(spread(ids, 1, source.shape), out)


def _weight_norm(forest: ChannelLabels, labelled: Labelled, args: Any, out: Any) -> Any:
    """A weight (filters, ...) scaled to a norm of its own for each filter."""
    first, second = (_labels_of(labelled, value) for value in args[:2])
    if first is None or second is None:
        fix_all(forest, [first, second], MEETS_FIXED)
        return None
    forest.unite(per_channel(forest, first, 0), per_channel(forest, second, 0))
    return of_first(first, out)


def _constructed(labelled: Labelled, args: Any, out: Any) -> Tensor | None:
    """`x.new_zeros(x.shape)` follows x; any other size may or may not follow the channels, which verification tells."""
    if not isinstance(out, Tensor) or not out.is_floating_point() or out.dim() == 0:
        return None
    source = args[0] if args and isinstance(args[0], Tensor) else None
    if id(source) in labelled and source is not None and source.shape == out.shape:
        return labelled[id(source)][1]
    return torch.full([1] * out.dim(), BLANK).expand(out.shape)


def _redraws(func: Any, args: Any, out: Any) -> bool:
    """Random numbers in the shape of the first argument: written into it (dropout's mask), or from it (RReLU)."""
    first = args[0] if args else None
    if torch.Tag.nondeterministic_seeded not in func.tags or not isinstance(first, Tensor):
        return False
    return isinstance(out, Tensor) and out.shape == first.shape


def pointwise(
    forest: ChannelLabels,
    inputs: Sequence[Tensor],
    labels: Sequence[Tensor | None],
    moving: Sequence[bool],
    out: Tensor,
    name: str,
) -> Tensor | None:
    """Elements that meet go together; an operand spread over the channels of another ties nothing, but must stay.

    `moving` says which of the inputs are activations; the others are held by modules.
    """
    rank = out.dim()
    wide = [None if each is None else each.view(_aligned(each, rank)) for each in labels]
    held = _let_go(forest, wide, moving, name) if any(moving) else [False] * len(wide)
    dims = {
        dim
        for each, is_held in zip(wide, held, strict=True)
        if each is not None and not is_held
        for dim in varying(each)
    }
    result: Tensor | None = None
    # Activations first: what comes out has their labels, not those of a vector that they meet.
    for value, each, is_held in sorted(zip(inputs, wide, held, strict=True), key=lambda operand: operand[2]):
        shape = _aligned(value, rank)
        narrow = not is_held and any(shape[dim] == 1 and out.shape[dim] > 1 for dim in dims)
        if narrow or (each is None and value.dim() == 0):
            if each is not None:
                forest.fix(compact(each).unique(), f"{name!r} spreads it over the channels of another")
            continue
        part = compact(each) if each is not None else torch.zeros([1] * rank, dtype=torch.int64)
        if result is not None:
            if any(bool((each == BLANK).any()) for each in (result, part)):
                for each in (result, part):
                    forest.hint(each.unique(), HARD_SIZE)
            forest.unite(*torch.broadcast_tensors(result, part))
            result = combined(result, part)
        else:
            result = part
    return None if result is None else result.expand(out.shape)


def _let_go(forest: ChannelLabels, wide: list[Tensor | None], moving: Sequence[bool], name: str) -> list[bool]:
    """Which operands are tensors that a module holds, beside activations whose channels they meet.

    One that meets none of them (a number per position, or activations without labels) gets None in `wide`.
    """
    reached = {
        dim for each, moves in zip(wide, moving, strict=True) if each is not None and moves for dim in varying(each)
    }
    held = [False] * len(wide)
    for place, (each, moves) in enumerate(zip(wide, moving, strict=True)):
        own = [] if each is None or moves else varying(each)
        held[place] = bool(reached & {*own})
        if each is not None and own and not held[place]:
            forest.fix(compact(each).unique(), f"{name!r} meets no channels there")
            wide[place] = None
    return held


def _aligned(value: Tensor, rank: int) -> list[int]:
    return [1] * (rank - value.dim()) + list(value.shape)


def _structural(forest: ChannelLabels, labelled: Labelled, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    def to_labels(value: Tensor) -> Tensor:
        if id(value) in labelled:
            return labelled[id(value)][1]
        return torch.zeros(value.shape, dtype=torch.int64) if value.is_floating_point() else value

    source = _labels_of(labelled, args[0])
    if name == "constant_pad_nd" and source is not None:
        return _pad(source, args[1])
    if source is not None and name in ("view", "_unsafe_view", "reshape"):
        return _reshape(forest, source, args[1])
    moved_args, moved_kwargs = tree_map_only(Tensor, to_labels, (args, kwargs))
    moved = func(*moved_args, **moved_kwargs)
    if name in ("split", "split_with_sizes", "chunk") and len({part.shape for part in moved}) == 1:
        _tie_parts(forest, moved)
    if name == "cat" and bool((moved == BLANK).any()):
        forest.hint(moved.unique(), FILLED_UP)
    return tree_map_only(Tensor, compress, moved)


def _joined(forest: ChannelLabels, moved: Tensor, labelled: Labelled, data: Container[int], args: Any) -> Tensor:
    """A vector that a module holds, put beside the positions of an activation (a class token), has its channels."""
    parts, dim = args[0], (args[1] if len(args) > 1 else 0) % moved.dim()
    known = [labelled[id(part)][1] for part in parts if id(part) in data and id(part) in labelled]
    held = [labelled[id(part)][1] for part in parts if id(part) not in data and id(part) in labelled]
    if not known or not held or any(dim in varying(each) for each in known):
        return moved
    first = known[0].narrow(dim, 0, 1)
    for each in (*known[1:], *held):
        forest.unite(*torch.broadcast_tensors(first, compact(each)))
    return first.expand(moved.shape) if len(known) + len(held) == len(parts) else moved


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
    moved = spread(per_channel(forest, labels, dim), dim, first.shape)
    # The places of the maxima are a map per channel, too.
    return moved if isinstance(out, Tensor) else [moved] * len(out)


def _unpooled(forest: ChannelLabels, operands: Sequence[Tensor | None], name: str, out: Tensor) -> Tensor:
    """Channel i is spread by channel i of the indices: what was pooled and what is unpooled go together."""
    dim = out.dim() - (3 if name.endswith("2d") else 4)
    values, places = (channel_ids(forest, labels, dim, out.shape[dim]) for labels in operands)
    forest.unite(values, places)
    return spread(np.maximum(values, places), dim, out.shape)


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
