"""Partition of a traced network: the prefix, whose values no mask changes, and the suffix, which runs per mask.

Shapes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..networks.copying import copied
from ..networks.graph_passes import fold_batch_norms, functionalise, reuse_memory
from ..networks.memory_layout import CHANNELS_LAST, arranged, layout_of, order_weights
from ..networks.sized_tracing import traced as trace
from ..surgery.filter_group import FilterGroup, masked_modules
from .fused_conv import FusedConv, feeders, fuse

Frontier = tuple[Tensor, ...]


@dataclass(frozen=True)
class GraphPartition:
    """`suffix(*prefix(images))` is the network.

    Attributes:
        prefix: makes the frontier.
        suffix: reads it.
        masked: the modules whose weights carry the masks, by name.
        fused: of the network's convolutions, those that run in fused form.
        feeders: fused convolution -> the one that makes its whole input (`fused_conv.feeders`).
    """

    prefix: Callable[..., Frontier]
    suffix: fx.GraphModule | nn.Module
    masked: nn.Module
    fused: Mapping[str, FusedConv] = field(default_factory=dict)
    feeders: Mapping[FusedConv, FusedConv] = field(default_factory=dict)


def unpartitioned(model: nn.Module, example: Tensor) -> GraphPartition:
    """The whole network as the suffix, behind a frontier that is the images themselves, which are like `example`."""
    ready = _evaluation_copy(model, layout_of(model, example))
    return GraphPartition(lambda images: (images,), ready, ready)


def partition(model: nn.Module, groups: Sequence[FilterGroup], example: Tensor, *, fusing: bool) -> GraphPartition:
    """Trace and simplify the network, and partition it before the first consumers of `groups`.

    Args:
        model: the network, copied and never changed.
        groups: the groups whose masks will vary.
        example: (B, ...) a few images.
        fusing: whether convolutions run in fused form (`fused_conv`), which makes channels-last maps, so only where
            the network takes them (`layout_of`).

    Raises whatever stands in the way.
    """
    layout = layout_of(model, example)
    example = arranged(example, layout)
    original = _evaluation_copy(model, layout)
    ready = copied(original)
    traced = trace(ready, example)
    if sum(node.op == "placeholder" for node in traced.graph.nodes) != 1:
        raise ValueError("its forward takes several arguments")
    functionalise(traced)
    fold_batch_norms(traced)
    consumers = masked_modules(groups)
    for name in consumers - {node.target for node in traced.graph.nodes}:
        traced.add_submodule(name, ready.get_submodule(name))  # it runs in training mode only
    with torch.inference_mode():
        _Shapes(traced).run(example)
        made = _Partitioner(traced, consumers, len(example)).partition(fusing and layout == CHANNELS_LAST)
        check_same(original(example), made.suffix(*made.prefix(example)))
    return made


def _evaluation_copy(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """A copy in evaluation mode without gradients, the weights of 2d convolutions in the order of the images."""
    ready = copied(model).eval().requires_grad_(False)
    order_weights(ready, layout)
    return ready


def _runs_once(traced: fx.GraphModule) -> set[str]:
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    modules = [id(traced.get_submodule(name)) for name in calls]
    return {name for name, module in zip(calls, modules, strict=True) if modules.count(module) == 1}


def check_same(expected: Any, got: Any, tolerance: float = 1e-3) -> None:
    """ValueError unless both are the same logits, to rounding."""
    if not isinstance(expected, Tensor):
        raise ValueError(f"it returns {type(expected).__name__}, not logits")
    if not torch.allclose(expected, got, rtol=tolerance, atol=tolerance / 10 * float(expected.abs().max())):
        raise ValueError("the traced network does not give the same logits")


class _Shapes(fx.Interpreter):
    """Notes on every node whether its value is a tensor, and its shape."""

    def run_node(self, n: fx.Node) -> Any:
        """Run and note."""
        value = super().run_node(n)
        n.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        return value


class _Partitioner:
    """Sorts the nodes of a traced network by what they depend on, and copies them into two graphs."""

    def __init__(self, traced: fx.GraphModule, consumers: set[str], n_images: int) -> None:
        self._traced, self._n_images = traced, n_images
        self._on_images: set[fx.Node] = set()
        self._on_masks: set[fx.Node] = set()
        modules = {id(traced.get_submodule(name)) for name in consumers}
        for node in traced.graph.nodes:
            is_consumer = node.op == "call_module" and id(traced.get_submodule(node.target)) in modules
            if is_consumer or any(source in self._on_masks for source in node.all_input_nodes):
                self._on_masks.add(node)
            if node.op == "placeholder" or any(source in self._on_images for source in node.all_input_nodes):
                self._on_images.add(node)

    def partition(self, fusing: bool) -> GraphPartition:
        """Prefix and suffix, as modules that share the traced network's layers."""
        frontier = self._frontier()
        prefix, suffix = self._prefix(frontier), self._suffix(frontier)
        for part in (prefix, suffix):
            reuse_memory(part)
        fused: dict[str, FusedConv] = {}
        if fusing:
            once = _runs_once(self._traced)
            fused = {**fuse(prefix, once), **fuse(suffix, once)}
        return GraphPartition(prefix, suffix, self._traced, fused, {**feeders(prefix), **feeders(suffix)})

    def _cached(self, node: fx.Node) -> bool:
        """Whether the node's value is worth keeping: one row per image, the same under every mask.

        Sizes and tuples are cheap: the suffix makes them again from what they came from.
        """
        shape = node.meta.get("shape")
        if node not in self._on_images or node in self._on_masks or not shape:
            return False
        return bool(shape[0] == self._n_images)

    def _needed(self, wanted: Iterable[fx.Node], given: Callable[[fx.Node], bool]) -> list[fx.Node]:
        """Nodes that `wanted` needs, in order, looking no further back than what is given."""
        needed: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(() if given(node) else node.all_input_nodes)
        return [node for node in self._traced.graph.nodes if node in needed]

    def _behind(self) -> list[fx.Node]:
        """Nodes that the output needs once the frontier is given, frontier included."""
        return self._needed([node for node in self._traced.graph.nodes if node.op == "output"], self._cached)

    def _frontier(self) -> list[fx.Node]:
        return [node for node in self._behind() if self._cached(node)]

    def _prefix(self, frontier: list[fx.Node]) -> fx.GraphModule:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self._needed(frontier, lambda _node: False):
            copies[node] = graph.node_copy(node, lambda source: copies[source])
        graph.output(tuple(copies[node] for node in frontier))
        return fx.GraphModule(self._traced, graph)

    def _suffix(self, frontier: list[fx.Node]) -> fx.GraphModule:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for position, node in enumerate(frontier):
            copies[node] = graph.placeholder(f"frontier_{position}")
            copies[node].meta["shape"] = node.meta["shape"]
        for node in self._behind():
            if node not in copies:
                copies[node] = graph.node_copy(node, lambda source: copies[source])
        return fx.GraphModule(self._traced, graph)
