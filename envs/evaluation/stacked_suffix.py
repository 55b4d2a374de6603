"""Stacked suffix: many masks in one batch, for devices that many small passes would leave idle.

All masks look at the same frontier. So the layer that reads the masked filters makes every mask's outputs from it at
once, as one layer with M times as many outputs, and everything behind it runs once, on M x B rows.

Shapes: M masks, B images, K outputs and C inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..networks.graph_passes import free_name
from ..networks.memory_layout import CHANNELS_LAST, arranged
from ..networks.module_kinds import is_leaf
from .graph_partition import check_same


@torch.inference_mode()
def stacked_suffix(
    suffix: fx.GraphModule,
    frontier: tuple[Tensor, ...],
    weights: Mapping[str, Tensor],
    layout: torch.memory_format = CHANNELS_LAST,
) -> StackedSuffix | None:
    """A suffix whose masks run in one batch; None where it cannot.

    Args:
        suffix: the network behind its frontier.
        frontier: of a few images, to see whether the stacked network gives the same.
        weights: of every consumer, without a mask.
        layout: of images in memory, as the network takes them (`layout_of`).
    """
    exact = all(value.dtype == torch.float32 for value in frontier)
    try:
        stacked = StackedSuffix(suffix, weights, layout)
        alone = suffix(*frontier)
        for logits in stacked(frontier, {name: torch.stack([weight, weight]) for name, weight in weights.items()}):
            check_same(alone, logits, 1e-3 if exact else 0.1)
    except (RuntimeError, ValueError):
        return None
    return stacked


class StackedLayer(nn.Module):
    """A convolution or linear layer with weights of its own for every mask.

    Args:
        layer: where its bias and its geometry come from.
        shared: whether its input is the same for all masks, B rows; otherwise it comes with M x B.
        layout: of the maps it makes.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, shared: bool, layout: torch.memory_format) -> None:
        super().__init__()
        self.layer, self.shared, self.layout = layer, shared, layout
        self.weights: Tensor = layer.weight.detach()[None]

    def forward(self, x: Tensor) -> Tensor:
        """(M x B, K, ...), mask after mask."""
        n_masks, bias = len(self.weights), self.layer.bias
        if not self.shared:
            parts = zip(x.chunk(n_masks), self.weights, strict=True)
            return torch.cat([self._applied(rows, weight, bias) for rows, weight in parts])
        wide = self._applied(x, self.weights.flatten(0, 1), None if bias is None else bias.repeat(n_masks))
        rows = wide.movedim(1, -1).unflatten(-1, (n_masks, -1)).movedim(-2, 0).flatten(0, 1)
        return arranged(rows.movedim(-1, 1), self.layout)

    def _applied(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        return self.layer._conv_forward(x, weight, bias)


class Repeated(nn.Module):
    """Rows that no mask changes, for each of `n_masks` masks; `layout` is that of images."""

    def __init__(self, layout: torch.memory_format) -> None:
        super().__init__()
        self.n_masks, self.layout = 1, layout

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (M x B, ...)."""
        rows = x.movedim(1, -1) if x.dim() == 4 else x
        rows = rows.expand(self.n_masks, *rows.shape).flatten(0, 1)
        return arranged(rows.movedim(-1, 1), self.layout) if x.dim() == 4 else rows


class StackedSuffix:
    """A suffix that runs under M masks at once.

    Args:
        suffix: the network behind its frontier; its layers are shared, not copied.
        consumers: names of the layers whose weights differ from mask to mask.
        layout: of images in memory.

    Raises ValueError where a consumer is neither a plain convolution over images nor linear, or runs twice.
    """

    def __init__(
        self, suffix: fx.GraphModule, consumers: Collection[str], layout: torch.memory_format = CHANNELS_LAST
    ) -> None:
        self.layers: dict[str, StackedLayer] = {}
        self._layout, self._repeated = layout, Repeated(layout)
        graph = fx.Graph()
        graph.output(graph.graph_copy(suffix.graph, {}))
        self.graph = fx.GraphModule(suffix, graph)
        for node in list(graph.nodes):
            if node.op == "call_module" and node.target in consumers:
                self._exchange(node)
        self._repeat_inputs()
        graph.lint()
        self.graph.recompile()
        self.run: Callable[..., Tensor] = self.graph

    def __call__(self, frontier: tuple[Tensor, ...], weights: Mapping[str, Tensor]) -> Tensor:
        """Logits (M, B, ...) for the frontier of B images and weights (M, K, C, ...) of every consumer."""
        for name, layer in self.layers.items():
            layer.weights = weights[name].to(layer.layer.weight.dtype)
        self._repeated.n_masks = len(next(iter(weights.values())))
        return self.run(*frontier).unflatten(0, (self._repeated.n_masks, -1))

    def _exchange(self, node: fx.Node) -> None:
        name = str(node.target)
        layer = self.graph.get_submodule(name)
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or grouped or not is_leaf(layer) or name in self.layers:
            raise ValueError(f"masks of {name!r} cannot run in one batch")
        source = node.args[0]
        assert isinstance(source, fx.Node)
        self.layers[name] = StackedLayer(layer, source.op == "placeholder", self._layout)
        node.target = free_name(self.graph, f"stacked_{name.replace('.', '_')}")
        self.graph.add_submodule(node.target, self.layers[name])

    def _repeat_inputs(self) -> None:
        """Everything but the consumers reads the frontier once for each mask."""
        graph, own = self.graph.graph, set(self.layers.values())
        place = free_name(self.graph, "repeated")
        self.graph.add_submodule(place, self._repeated)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        for node in inputs:
            others = [user for user in node.users if not self._is_own(user, own)]
            if others:
                with graph.inserting_after(inputs[-1]):
                    repeated = graph.call_module(place, (node,))
                repeated.meta = dict(node.meta)
                for user in others:
                    user.replace_input_with(node, repeated)

    def _is_own(self, node: fx.Node, own: set[StackedLayer]) -> bool:
        return node.op == "call_module" and self.graph.get_submodule(str(node.target)) in own
