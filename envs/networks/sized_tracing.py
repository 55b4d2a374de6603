"""Tracing of a network by `torch.fx`, with the sizes of its values at hand where its forward asks for them.

Hugging Face's networks compare the number of channels with the configured one, and pad by sizes: plain symbolic tracing
knows no sizes and stops there. The second attempt runs the network beside the trace on two batches: what is the same
number in both depends on no batch and is a constant; a condition on the values of images still stops it.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError

from .module_kinds import LeafTracer

VALUES = "values"  # of a node, for the two batches


def traced(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of `model` for images like `example` (B, ...); the modules are shared with it.

    Raises whatever stands in the way of a trace.
    """
    with _lengths():
        try:
            return fx.GraphModule(model, LeafTracer().trace(model))
        except Exception:
            with torch.no_grad():
                found = fx.GraphModule(model, _SizedTracer(example).trace(model))
    for node in found.graph.nodes:
        node.meta.pop(VALUES, None)
    return found


@contextmanager
def _lengths() -> Iterator[None]:
    """`len(x)` of a traced value is a node of its own: Python's `len` takes nothing but a number for an answer."""
    usual = builtins.len

    def length(value: Any) -> Any:
        if not isinstance(value, fx.Proxy):
            return usual(value)
        made = value.tracer.create_proxy("call_function", usual, (value,), {})
        known = made.node.meta.get(VALUES)
        return known[0] if known is not None and known[0] == known[1] else made

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = usual


class _SizedTracer(LeafTracer):
    """Knows the value of every node for two batches, of B and of 2 B + 3 images."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        more = torch.arange(2 * len(example) + 3, device=example.device) % len(example)
        self._running = False  # a layer for real, inside the trace
        self.batches = (example.clone(), example[more])  # a forward may change its images

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that knows sizes."""
        return _Sized(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **others: Any) -> Any:
        """Note the node, and its values."""
        made = super().create_proxy(kind, target, args, kwargs, *more, **others)
        if isinstance(made, fx.Proxy):
            self._running = True
            try:
                made.node.meta[VALUES] = tuple(self._value(made.node, which) for which in range(2))
            finally:
                self._running = False
        return made

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """As it is where a layer runs for real."""
        return forward(*args, **kwargs) if self._running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As it is where a layer runs for real."""
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _known(self, source: fx.Node, which: int) -> Any:
        if VALUES not in source.meta:  # of a constant, whose node torch made
            source.meta[VALUES] = tuple(self._value(source, each) for each in range(2))
        return source.meta[VALUES][which]

    def _value(self, node: fx.Node, which: int) -> Any:
        if node.op == "placeholder":
            return self.batches[which]
        if node.op == "get_attr":
            value: Any = self.root
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value
        args: Any = map_arg(node.args, lambda source: self._known(source, which))
        kwargs: Any = map_arg(node.kwargs, lambda source: self._known(source, which))
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The value of a condition that is the same for both batches and looks at sizes alone."""
        first, second = obj.node.meta[VALUES]
        if isinstance(first, Tensor) or first != second:
            raise TraceError("a condition looks at the values of images, or at their number")
        return bool(first)


class _Sized(fx.Proxy):
    """A proxy whose sizes are numbers, apart from those that follow the batch."""

    @property
    def shape(self) -> Any:
        """As that of a tensor, in a tuple."""
        return self._sizes(fx.Proxy.__getattr__(self, "shape"))

    def size(self, dim: int | None = None) -> Any:
        """As that of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As that of a tensor."""
        return self._known("dim")()

    @property
    def ndim(self) -> int:
        """As that of a tensor."""
        return self._known("ndim")

    def _known(self, name: str) -> Any:
        return getattr(self.node.meta[VALUES][0], name)

    def _sizes(self, symbolic: Any) -> tuple[Any, ...]:
        pairs = zip(*(value.shape for value in self.node.meta[VALUES]), strict=True)
        return tuple(one if one == other else symbolic[place] for place, (one, other) in enumerate(pairs))
