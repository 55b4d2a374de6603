"""Fused convolutions on a CPU: a convolution and what follows it in one oneDNN call, on the channels a mask keeps.

oneDNN can add a residual and apply ReLU while a convolution's result is still in registers, and takes weights packed
beforehand. torch offers both to its compiler (`torch.ops.mkldnn`); here they are called without compiling. Where torch
or the processor lacks them (`can_fuse`), nothing is fused.

A convolution over a map of a few pixels runs as one matrix product. A padded 3x3 kernel on a 2x2 map multiplies zeros
of the padding more often than pixels (20 of its 36 products per channel), and libraries get little speed out of rows of
two pixels. As a matrix from all pixels to all pixels it takes 16 products per channel, in one large product.

Shapes: B images, C input channels, K output channels, (H, W) map, (P, Q) map it becomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ..networks.graph_passes import exchange, only_user, relu_after
from ..networks.module_kinds import is_plain_conv2d

_PER_CHANNEL = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Identity)

# `reuse_memory` writes these in place only into what a layer has just made.
_OWN_MEMORY = (functional.pad, torch.relu_, "add_")
_DTYPES = (torch.float32, torch.bfloat16)

Pair = Sequence[int]


class FusedConv(nn.Module):
    """`relu?(conv(x) + residual?)`, with weights that can be exchanged and channels that can be left out.

    Args:
        conv: an ordinary 2d convolution; its weight and bias are kept as they are.
        relu: whether a ReLU follows.
        size: (H, W) of its input, if that is always the same; a small one makes it a matrix product.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        # No buffers: the dense weights stay in full precision whatever the network is cast to.
        self.weight: Tensor = conv.weight.detach()
        self.bias: Tensor | None = None if conv.bias is None else conv.bias.detach()
        self.n_groups, self.relu = conv.groups, relu
        self._how = ([int(side) for side in conv.padding], list(conv.stride), list(conv.dilation), conv.groups)
        self._matrix_of = None if size is None or conv.groups > 1 else _small(conv, size)
        self.cast(conv.weight.dtype)

    def cast(self, dtype: torch.dtype) -> None:
        """Compute in this precision from now on."""
        self.dtype = dtype
        self._whole = self._packed(self.weight, self.bias)
        self.reset()

    def reset(self) -> None:
        """Back to the weights and channels it was made with."""
        self._now = self._whole
        self._reads: Tensor | None = None

    def load(
        self,
        weight: Tensor | None = None,
        reads: Tensor | None = None,
        writes: Tensor | None = None,
        narrow: bool = False,
    ) -> None:
        """Take other weights, and only some channels.

        Args:
            weight: (K, C, h, w); None keeps its own.
            reads: input channels that matter, (C',) int64; None means all.
            writes: output channels to compute, (K',) int64; None means all.
            narrow: the input comes with the channels of `reads` only; otherwise they are picked out of it.
        """
        bias: Tensor | None = self.bias
        weight = self.weight if weight is None else weight
        if writes is not None:
            weight, bias = weight[writes], None if bias is None else bias[writes]
        weight = weight if reads is None else weight[:, reads]
        self._now, self._reads = self._packed(weight, bias), None if narrow else reads

    def _packed(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias = None if bias is None else bias.to(self.dtype)
        if self._matrix_of is not None:
            size, becomes = self._matrix_of
            matrix = _as_matrix(weight.to(self.dtype), size, *self._how[:3])
            packed = torch.ops.mkldnn._reorder_linear_weight(matrix)
            return packed, None if bias is None else bias.repeat(becomes[0] * becomes[1])
        dense = weight.to(self.dtype).contiguous(memory_format=torch.channels_last)
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        return reorder(dense.to_mkldnn(), *self._how, None), bias

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, K, H, W); a residual is overwritten with the result."""
        if self._reads is not None:
            x = picked(x, self._reads)
        weight, bias = self._now
        if self._matrix_of is not None:
            return self._multiplied(x, residual)
        if residual is None:
            alone = "relu" if self.relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *self._how, alone, [], "")
        activation = "relu" if self.relu else None
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, weight, bias, *self._how, "add", None, activation, [], ""
        )

    def _multiplied(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """`forward` as a matrix product."""
        assert self._matrix_of is not None
        weight, bias = self._now
        rows = x.permute(0, 2, 3, 1).reshape(len(x), -1)
        how = "relu" if self.relu and residual is None else "none"
        out = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, how, [], "")
        out = out.view(len(x), *self._matrix_of[1], -1).permute(0, 3, 1, 2)
        if residual is None:
            return out
        residual.add_(out)
        return residual.relu_() if self.relu else residual


def _small(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, ...]] | None:
    """The map a convolution reads and the one it makes, if they are small enough for a matrix."""
    padding = [int(side) for side in conv.padding]
    becomes = _map_after(size, conv.kernel_size, padding, conv.stride, conv.dilation)
    return (size, becomes) if _is_small(size, conv.kernel_size, becomes) else None


def picked(x: Tensor, channels: Tensor) -> Tensor:
    """Some channels of (B, C, H, W), in channels_last order: one pass over memory."""
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, c).index_select(1, channels)
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def _map_after(size: Pair, kernel: Pair, padding: Pair, stride: Pair, dilation: Pair) -> tuple[int, ...]:
    """(P, Q), what a convolution makes of a map of `size` (H, W)."""
    sides = zip(size, kernel, padding, stride, dilation, strict=True)
    return tuple((n + 2 * pad - gap * (k - 1) - 1) // step + 1 for n, k, pad, step, gap in sides)


def _is_small(size: Pair, kernel: Pair, after: Pair) -> bool:
    """Whether the matrix has at most twice as many weights a channel as the kernel, so that it saves work."""
    return size[0] * size[1] * after[0] * after[1] <= 2 * kernel[0] * kernel[1]


def _as_matrix(weight: Tensor, size: Pair, padding: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """The matrix (P Q K, H W C) that does on flattened channels_last maps what `weight` (K, C, h, w) does on maps."""
    n_out, n_in, *kernel = weight.shape
    after = _map_after(size, kernel, padding, stride, dilation)
    taps = weight.permute(0, 2, 3, 1)
    matrix = weight.new_zeros(*after, n_out, *size, n_in)
    for p in range(after[0]):
        for q in range(after[1]):
            for i in range(kernel[0]):
                for j in range(kernel[1]):
                    y, x = p * stride[0] - padding[0] + i * dilation[0], q * stride[1] - padding[1] + j * dilation[1]
                    if 0 <= y < size[0] and 0 <= x < size[1]:
                        matrix[p, q, :, y, x] = taps[:, i, j]
    return matrix.view(after[0] * after[1] * n_out, -1)


def can_fuse(example: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether torch and the processor have the fused operator for such images in this precision."""
    return (
        example.dim() == 4
        and example.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and (dtype != torch.bfloat16 or has_bfloat16())
    )


def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16 itself, as oneDNN needs (on x86: AVX-512, AVX-NE-CONVERT or AMX)."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def fuse(graph: fx.GraphModule, once: set[str]) -> dict[str, FusedConv]:
    """Replace convolutions of `once` (names of modules that run once), alone or with what follows them, in place.

    Returns the fused ones by the convolution's name.
    """
    fused: dict[str, FusedConv] = {}
    for node in list(graph.graph.nodes):
        name = str(node.target)
        conv = graph.get_submodule(name) if node.op == "call_module" and name in once else None
        if is_plain_conv2d(conv) and conv.weight.dtype in _DTYPES:
            fused[name] = _fuse_one(graph, node, conv)
    graph.graph.lint()
    graph.recompile()
    return fused


def _fuse_one(graph: fx.GraphModule, node: fx.Node, conv: nn.Conv2d) -> FusedConv:
    chain, inputs = [node], [node.args[0]]
    follower = only_user(node)
    if follower is not None and follower.op == "call_method" and follower.target == "add_":
        target, other = follower.args
        if target is node and _may_overwrite(graph, other, follower):
            chain.append(follower)
            inputs.append(other)
    relu = relu_after(graph, chain[-1])
    if relu is not None:
        chain.append(relu)
    made = FusedConv(conv, relu is not None, _size(node.args[0]))
    exchange(graph, chain, f"fused_{str(node.target).replace('.', '_')}", made, *inputs)
    return made


def _size(node: Any) -> tuple[int, int] | None:
    """(H, W) of a value, where its shape was noted."""
    shape = node.meta.get("shape") if isinstance(node, fx.Node) else None
    return (shape[2], shape[3]) if shape is not None and len(shape) == 4 else None


def _may_overwrite(graph: fx.GraphModule, value: Any, reader: fx.Node) -> bool:
    """Whether nothing looks at `value` after `reader`, not even through a view."""
    if not isinstance(value, fx.Node) or not (_is_fused(graph, value) or value.target in _OWN_MEMORY):
        return False
    order = {each: position for position, each in enumerate(graph.graph.nodes)}
    others = [user for user in value.users if user is not reader]
    return all(order[user] < order[reader] and _makes_new(graph, user) for user in others)


def _makes_new(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), (FusedConv, nn.Conv2d))


def _is_fused(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), FusedConv)


def feeders(graph: fx.GraphModule) -> dict[FusedConv, FusedConv]:
    """Fused convolution -> the one that alone makes its input, channel by channel, for it alone.

    What the reader does not read, its feeder does not have to compute.
    """
    found: dict[FusedConv, FusedConv] = {}
    for node in graph.graph.nodes:
        if _is_fused(graph, node):
            reader = graph.get_submodule(str(node.target))
            feeder = _feeder(graph, node.args[0])
            if isinstance(reader, FusedConv) and feeder is not None and reader.n_groups == feeder.n_groups == 1:
                found[reader] = feeder
    return found


def _feeder(graph: fx.GraphModule, node: Any) -> FusedConv | None:
    while isinstance(node, fx.Node) and len(node.users) == 1 and node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if isinstance(module, FusedConv):
            return module if len(node.args) == 1 else None
        if not isinstance(module, _PER_CHANNEL) or len(node.args) != 1:
            return None
        node = node.args[0]
    return None
