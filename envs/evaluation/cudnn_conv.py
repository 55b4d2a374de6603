"""Fused convolutions on an NVIDIA GPU: a convolution with the residual and the ReLU behind it in one kernel.

Small convolutions are bound by memory there: bias, sum and ReLU as kernels of their own read and write each map again.
cuDNN does all of them while the result is still in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ..networks.graph_passes import alike_summands, exchange, is_sum, only_user, relu_after
from ..networks.module_kinds import is_plain_conv2d


class CudnnConv(nn.Module):
    """`relu(conv(x) + residual?)`; the convolution's weights are read at every call.

    Args:
        conv: an ordinary 2d convolution.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.works = conv, True

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, K, H, W)."""
        if self.works and x.is_cuda:
            try:
                return self._in_one(x, residual)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.works = False  # cuDNN has no kernel for this shape and precision
        out: Tensor = self.conv(x)
        return (out if residual is None else out.add_(residual)).relu_()

    def _in_one(self, x: Tensor, residual: Tensor | None) -> Tensor:
        conv = self.conv
        how = (conv.bias, conv.stride, [int(side) for side in conv.padding], conv.dilation, conv.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(x, conv.weight, *how)
        return torch.cudnn_convolution_add_relu(x, conv.weight, residual, 1.0, *how)


def fuse_relu(graph: fx.GraphModule) -> int:
    """Replace convolutions that a ReLU follows, perhaps with a sum in between, in place; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        conv = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if is_plain_conv2d(conv):
            count += _fuse_one(graph, node, conv)
    graph.graph.lint()
    graph.recompile()
    return count


def _fuse_one(graph: fx.GraphModule, node: fx.Node, conv: nn.Conv2d) -> int:
    chain, inputs = [node], [node.args[0]]
    total = only_user(node)
    residual = None if total is None else _summed_with(node, total)
    if total is not None and residual is not None:
        chain.append(total)
        inputs.append(residual)
    relu = relu_after(graph, chain[-1])
    if relu is None:
        return 0
    exchange(graph, [*chain, relu], f"cudnn_{str(node.target).replace('.', '_')}", CudnnConv(conv), *inputs)
    return 1


def _summed_with(node: fx.Node, total: fx.Node) -> fx.Node | None:
    """What `total` adds to `node`, if it is a sum of two tensors of one shape."""
    in_place = total.op == "call_method" and total.target == "add_" and len(total.args) == 2 and not total.kwargs
    pairs = alike_summands(total) if in_place or is_sum(total) else []
    return next((other for target, other in pairs if target is node), None)
