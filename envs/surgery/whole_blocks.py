"""Whole blocks: a residual branch that keeps no filter is replaced by the constant it would add (depth pruning).

With every filter of a branch gone, its last layers see zeros: what the branch adds is one number per channel, the same
for all images. So dropping the block is exact. The user's classes and their `forward` stay: `Vanished` modules stand in
the branch's places, and all of them but the last one pass on a single channel of zeros, for the sake of its size.

Shapes: B images, K channels of the branch's output.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...errors import UserError, summarised
from ..networks.copying import copied
from ..networks.module_kinds import is_leaf, is_transposed
from .filter_group import Branch

VALUE = "value"
SIZE = 8  # of the map on which a constant is made: large enough for the pools and kernels of a branch

Geometry = tuple[tuple[int, int, int], ...]
"""Of every spatial dimension: extent of the kernel (dilation included), stride, padding on both sides together."""


class Vanished(nn.Module):
    """Stands in the place of a layer of a vanished block; made by `vanish`, also usable by itself.

    Args:
        value: (K,), what the whole branch adds to every position of its channels, for the module whose output leaves
            the branch; it is a parameter, so fine-tuning trains it. None for the layers before it.
        geometry: how the layer changed the size of a map; empty where it did not.
        head: whether it reads the block's input, of which nothing but its size must get on.
        last: whether channels are the last dimension, as linear layers have them, and not the second.
        written: whether the network writes into the output (`out += identity`), which then needs memory of its own;
            otherwise it is a view that takes none.

    Takes (B, C, ...) or, with `last`, (B, ..., C). Returns (B, K, ...) in the new size, or one channel of zeros.
    """

    traced_whole = True  # `module_kinds.LeafTracer`

    def __init__(
        self,
        value: Tensor | None = None,
        geometry: Geometry = (),
        *,
        head: bool = False,
        last: bool = False,
        written: bool = False,
    ) -> None:
        super().__init__()
        self.value = None if value is None else nn.Parameter(value.detach().clone())
        self.geometry, self.head, self.last, self.written = tuple(geometry), head, last, written

    def forward(self, x: Tensor, *others: Any, **more: Any) -> Tensor:
        """The constant in the shape of the layer's output, or zeros with one channel."""
        if self.value is None and not self.head and not self.geometry:
            return x
        sizes = list(x.shape[1:-1] if self.last else x.shape[2:])
        if self.geometry:
            steps = zip(sizes, self.geometry, strict=True)
            sizes = [(size + pad - extent) // step + 1 for size, (extent, step, pad) in steps]
        n_images = x.shape[0]  # len(x) would fix it in an exported program
        if self.value is None:
            return x.new_zeros([n_images, *sizes, 1] if self.last else [n_images, 1, *sizes])
        value = self.value if self.last else self.value.view(1, -1, *[1] * len(sizes))
        value = value.expand([n_images, *sizes, -1] if self.last else [n_images, -1, *sizes])
        return value.clone(memory_format=torch.contiguous_format) if self.written else value

    def extra_repr(self) -> str:
        """What is left."""
        return "" if self.value is None else f"{len(self.value)} constants"


def vanish(model: nn.Module, branches: Sequence[Branch], values: Sequence[Tensor | None] = ()) -> None:
    """Replace the layers of these branches by `Vanished` ones, in place.

    Args:
        model: the network, cut or not.
        branches: as found in it (`groups/branches.py`).
        values: what each adds to its channels, (K,); without them it is worked out (`constant`).

    Raises UserError where a module is missing, or the constant cannot be made.
    """
    found = [value if value is not None else constant(model, each) for each, value in _pairs(branches, values)]
    swaps: dict[str, Vanished] = {}
    for branch, value in zip(branches, found, strict=True):
        last = isinstance(find_module(model, branch.chain[0]), nn.Linear)
        for name in branch.inside:
            old = find_module(model, name)
            swaps[name] = Vanished(
                None, geometry(old), head=name in branch.heads, last=isinstance(old, nn.Linear | nn.LayerNorm)
            )
        size = geometry(find_module(model, branch.tail))
        swaps[branch.tail] = Vanished(value, size, last=last, written=branch.written)
    for outer in branches:  # a block inside the branch of another has gone with it
        for inner in branches:
            if inner is not outer and inner.tail in outer.inside and inner.tail != outer.tail:
                swaps[inner.tail] = Vanished(None, swaps[inner.tail].geometry, last=swaps[inner.tail].last)
    for name, new in swaps.items():
        new.train(find_module(model, name).training)
        parent, _, key = name.rpartition(".")
        setattr(find_module(model, parent), key, new)


def _pairs(branches: Sequence[Branch], values: Sequence[Tensor | None]) -> list[tuple[Branch, Tensor | None]]:
    return list(zip(branches, values or [None] * len(branches), strict=True))


@torch.no_grad()
def constant(model: nn.Module, branch: Branch) -> Tensor:
    """(K,), what `branch` puts out in evaluation mode while its last filters are all zero; UserError if it varies."""
    reader = find_module(model, branch.chain[0])
    weight, bias = getattr(reader, "weight", None), getattr(reader, "bias", None)
    if not isinstance(weight, Tensor) or not isinstance(reader, nn.Linear | _ConvNd):
        raise UserError(f"{branch.chain[0]!r} is a {type(reader).__name__}; expected a convolution or a linear layer.")
    n_out = reader.out_features if isinstance(reader, nn.Linear) else reader.out_channels
    out = weight.new_zeros(n_out) if not isinstance(bias, Tensor) else bias.detach()
    last, n_dims = isinstance(reader, nn.Linear), weight.dim() - 2 or 2
    out = (
        out.expand(1, *[SIZE] * n_dims, n_out)
        if last
        else out.view(1, -1, *[1] * n_dims).expand(1, -1, *[SIZE] * n_dims)
    )
    out = out.contiguous()
    try:
        for name in branch.chain[1:]:
            out = copied(find_module(model, name)).eval()(out)
        flat = out.movedim(-1 if last else 1, 0).flatten(1)
    except Exception as error:
        raise UserError(f"The branch that ends in {branch.tail!r} cannot vanish ({summarised(error)}).") from error
    if not flat.is_meta and not torch.allclose(flat, flat[:, :1].expand_as(flat), rtol=1e-4, atol=1e-6):
        raise UserError(f"The branch that ends in {branch.tail!r} cannot vanish: what it adds differs by position.")
    return flat[:, 0].clone()


def geometry(layer: nn.Module) -> Geometry:
    """How a convolution changes the size of its maps; empty for other layers, and for one that keeps every size."""
    if not isinstance(layer, _ConvNd) or layer.padding == "same":
        return ()
    if is_transposed(layer):
        raise UserError("A transposed convolution cannot vanish.")
    padding = [0] * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
    found = tuple(
        (int(gap) * (int(side) - 1) + 1, int(step), 2 * int(pad))
        for side, step, pad, gap in zip(layer.kernel_size, layer.stride, padding, layer.dilation, strict=True)
    )
    return () if all(step == 1 and pad == extent - 1 for extent, step, pad in found) else found


def can_go(layer: nn.Module) -> bool:
    """Whether a layer can be replaced: one of torch's that keeps sizes, or changes them as a convolution does."""
    if is_leaf(layer):
        return not (isinstance(layer, _ConvNd) and is_transposed(layer))
    kind = type(layer).__module__
    return kind in ("torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.instancenorm") and (
        not isinstance(layer, nn.MultiheadAttention | nn.GLU)
    )


def is_within(name: str, modules: Collection[str]) -> bool:
    """Whether a module is one of `modules`, or inside one."""
    return any(name == each or name.startswith(f"{each}.") for each in modules)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that qualified name; UserError if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UserError(f"The network has no module {name!r}; was it built by another constructor?") from error
