"""A network cut in two: what does not depend on any mask is computed once, only the rest runs per mask.

Masks are folded into the weights of the consumers (`folding`), so a mask costs one pass through the suffix and no copy
of any activation. Networks that `torch.fx` cannot trace run whole, with the same folding and the same results.

Shapes: M masks, N filters, B images, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..rewards.errors import UserError
from .folding import fold, mixing_obstacle
from .graph_passes import fold_batch_norms, functionalise, reuse_memory
from .groups import FilterGroup
from .leaves import LeafTracer
from .masking import MixKey

Frontier = tuple[Tensor, ...]
METHODS = ("auto", "split", "whole")


@dataclass(frozen=True)
class Halves:
    """`suffix(*prefix(images))` is the network; `masked` are the modules behind the frontier, by name."""

    prefix: Callable[[Tensor], Frontier]
    suffix: fx.GraphModule | nn.Module
    masked: nn.Module


class MaskedNetwork:
    """Runs a network under keep masks of some of its groups.

    Args:
        model: the network; it is copied, never changed. It takes one tensor and returns logits (B, C).
        groups: the groups whose masks will vary.
        example: (B, ...) a few images; used to find out which values are per image and to check the split.
        method: "split" (traced, with a frontier), "whole" (every mask runs everything), or "auto": split if possible.

    `method` says which one is used, `why_whole` the reason if it is not "split".
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[FilterGroup], example: Tensor, *, method: str = "auto"
    ) -> None:
        if method not in METHODS:
            raise UserError(f"The evaluation method must be one of {', '.join(METHODS)}, got {method!r}.")
        self.groups = tuple(groups)
        self.why_whole = "it was asked for" if method == "whole" else ""
        self._halves, self.method = whole(model), "whole"
        if method != "whole":
            self._try_to_split(model, example, method)
        self._weights: dict[str, Tensor] = {
            cut.module: _weight(self._halves.masked, cut.module).detach().clone()
            for group in groups
            for cut in group.consumers
        }

    def _try_to_split(self, model: nn.Module, example: Tensor, method: str) -> None:
        try:
            halves = split(model, self.groups, example)
        except Exception as error:
            if method == "split":
                raise UserError(f'The network cannot be split ({error}); use method "whole" or "auto".') from error
            self.why_whole = f"the network cannot be split ({error})"
        else:
            self._halves, self.method = halves, "split"

    @torch.inference_mode()
    def prefix(self, images: Tensor) -> Frontier:
        """Every value that no mask changes and the suffix reads: tensors with B rows each."""
        return self._halves.prefix(images)

    def suffix(
        self,
        frontier: Frontier,
        masks: Mapping[str, Tensor],
        mixes: Mapping[MixKey, Tensor] | None = None,
    ) -> Tensor:
        """Logits (M, B, C) under M masks; see `masked` for the arguments."""
        n_masks = len(next(iter(masks.values())))
        out = []
        for index in range(n_masks):
            with self.masked(masks, index, mixes) as run:
                out.append(run(frontier))
        return torch.stack(out)

    def masked(self, masks: Mapping[str, Tensor], index: int, mixes: Mapping[MixKey, Tensor] | None = None) -> _Folded:
        """A context in which the suffix runs under mask number `index`.

        Args:
            masks: group name -> (M, N) bool; groups that are not named keep everything.
            index: which of the M.
            mixes: (group name, consumer name) -> (M, N, N), applied instead of the mask: x' = P x over filters.
        """
        return _Folded(self, masks, index, mixes or {})

    def _fold(self, masks: Mapping[str, Tensor], index: int, mixes: Mapping[MixKey, Tensor]) -> None:
        for name, weight in self._folded(masks, index, mixes):
            _weight(self._halves.masked, name).copy_(weight)

    def _folded(
        self, masks: Mapping[str, Tensor], index: int, mixes: Mapping[MixKey, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        folded: dict[str, Tensor] = {}
        for group in self.groups:
            for cut in group.consumers if group.name in masks else ():
                mix = mixes.get((group.name, cut.module))
                module = self._halves.masked.get_submodule(cut.module)
                if mix is not None and (why := mixing_obstacle(module, cut)):
                    raise ValueError(f"a mix cannot be applied at {cut.module!r}: {why}.")
                choice = masks[group.name][index] if mix is None else mix[index]
                weight = folded.get(cut.module, self._weights[cut.module])
                folded[cut.module] = fold(module, weight, cut, choice)
        yield from folded.items()

    def _restore(self, masks: Mapping[str, Tensor]) -> None:
        for group in self.groups:
            for cut in group.consumers if group.name in masks else ():
                _weight(self._halves.masked, cut.module).copy_(self._weights[cut.module])


class _Folded:
    """See `MaskedNetwork.masked`."""

    def __init__(
        self, network: MaskedNetwork, masks: Mapping[str, Tensor], index: int, mixes: Mapping[MixKey, Tensor]
    ) -> None:
        self._network, self._masks, self._index, self._mixes = network, masks, index, mixes

    def __enter__(self) -> Callable[[Frontier], Tensor]:
        with torch.no_grad():
            self._network._fold(self._masks, self._index, self._mixes)
        return self._run

    def __exit__(self, *_error: object) -> None:
        with torch.no_grad():
            self._network._restore(self._masks)

    @torch.inference_mode()
    def _run(self, frontier: Frontier) -> Tensor:
        return self._network._halves.suffix(*frontier)


def whole(model: nn.Module) -> Halves:
    """The network as it is, behind a frontier that is the images themselves."""
    ready = prepared(model)
    return Halves(lambda images: (images,), ready, ready)


def prepared(model: nn.Module) -> nn.Module:
    """A copy for evaluation: no gradients, channels_last weights where they are images'."""
    ready = copy.deepcopy(model).eval().requires_grad_(False)
    for module in ready.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and "weight" in module._parameters:
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return ready


def split(model: nn.Module, groups: Sequence[FilterGroup], example: Tensor) -> Halves:
    """Trace, simplify and cut the network before the first consumers of `groups`; raises whatever stands against it."""
    original = prepared(model)
    ready = copy.deepcopy(original)
    traced = fx.GraphModule(ready, LeafTracer().trace(ready))
    if sum(node.op == "placeholder" for node in traced.graph.nodes) != 1:
        raise ValueError("its forward takes several arguments")
    functionalise(traced)
    fold_batch_norms(traced)
    shapes = _Shapes(traced)
    with torch.inference_mode():
        shapes.run(example)
        consumers = {cut.module for group in groups for cut in group.consumers}
        halves = _Cutter(traced, consumers, len(example)).halves()
        _check(original(example), halves.suffix(*halves.prefix(example)))
    return halves


def _check(expected: Any, got: Any) -> None:
    if not isinstance(expected, Tensor):
        raise ValueError(f"it returns {type(expected).__name__}, not logits")
    if not torch.allclose(expected, got, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise ValueError("the traced network does not give the same logits")


def _weight(masked: nn.Module, name: str) -> Tensor:
    weight = masked.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


class _Shapes(fx.Interpreter):
    """Notes on every node whether its value is a tensor, and its shape."""

    def run_node(self, n: fx.Node) -> Any:
        """Run and note."""
        value = super().run_node(n)
        n.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        return value


class _Cutter:
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

    def halves(self) -> Halves:
        """The two halves, as modules that share the traced network's layers."""
        frontier = self._frontier()
        prefix = self._prefix(frontier)
        suffix = self._suffix(frontier)
        reuse_memory(suffix)
        return Halves(prefix, suffix, self._traced)

    def _cached(self, node: fx.Node) -> bool:
        """Whether the node's value is worth keeping: one row an image, the same under every mask.

        Sizes and tuples are cheap: the suffix makes them again from what they came from.
        """
        shape = node.meta.get("shape")
        if node not in self._on_images or node in self._on_masks or not shape:
            return False
        return bool(shape[0] == self._n_images)

    def _needed(self, wanted: Sequence[fx.Node], given: Callable[[fx.Node], bool]) -> list[fx.Node]:
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
