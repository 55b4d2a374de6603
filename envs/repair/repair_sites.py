"""Where a cut network can be repaired: layers that can be solved, and what stands around them in the graph."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from ..networks.graph_passes import only_user
from ..networks.module_kinds import is_leaf
from .patches import obstacle

_SUMS = {operator.add, operator.iadd, torch.add}


@dataclass(frozen=True)
class Site:
    """A layer that can be solved.

    Attributes:
        module: its name.
        norm: the batch norm right behind it, which takes the intercept.
        partner: the graph node that is added to its output (behind the norm) and is known before it runs.
    """

    module: str
    norm: str | None
    partner: str | None


def find_sites(traced: fx.GraphModule, max_inputs: int) -> tuple[dict[str, Site], dict[str, str]]:
    """The sites by graph node, and the layers that are left as cut, by name, with the reason."""
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    order = {node: position for position, node in enumerate(traced.graph.nodes)}
    sites, skipped = {}, {}
    for node in traced.graph.nodes:
        if not _is_layer(traced, node):
            continue
        module = traced.get_submodule(node.target)
        why = obstacle(module, max_inputs) if is_leaf(module) else "a class of its own"
        why = "it is called more than once" if calls[node.target] > 1 else why
        if why:
            skipped[node.target] = why
            continue
        norm = _norm_behind(traced, node, calls)
        partner = _partner(norm or node)
        known = partner is not None and order[partner] < order[node]
        name = partner.name if partner is not None and known else None
        sites[node.name] = Site(str(node.target), None if norm is None else str(norm.target), name)
    return sites, skipped


def shortcuts_first(traced: fx.GraphModule) -> None:
    """Reorder the graph so that what is added to a layer's output is computed before the layer, where it can be."""
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        if _is_layer(traced, node):
            partner = _partner(_norm_behind(traced, node, calls) or node)
            if partner is not None:
                _move_before(node, partner)
    traced.recompile()


def _is_layer(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = traced.get_submodule(str(node.target))
    return isinstance(getattr(module, "weight", None), torch.Tensor) and not isinstance(module, _BatchNorm)


def _norm_behind(traced: fx.GraphModule, node: fx.Node, calls: Counter[Any]) -> fx.Node | None:
    user = only_user(node)
    if user is None or user.op != "call_module" or calls[user.target] > 1:
        return None
    module = traced.get_submodule(str(user.target))
    return user if isinstance(module, _BatchNorm) and module.running_mean is not None else None


def _partner(tail: fx.Node) -> fx.Node | None:
    """What is added to the value of `tail`, if that is all that happens to it."""
    total = only_user(tail)
    if total is None or total.target not in _SUMS or total.kwargs or len(total.all_input_nodes) != 2:
        return None
    return next(each for each in total.all_input_nodes if each is not tail)


def _move_before(node: fx.Node, wanted: fx.Node) -> None:
    """Put `wanted`, and what it needs, before `node`; nothing happens if it depends on `node` itself."""
    order: Mapping[fx.Node, int] = {each: position for position, each in enumerate(node.graph.nodes)}
    needed: set[fx.Node] = set()
    stack = [wanted]
    while stack:
        each = stack.pop()
        if each is node:
            return
        if order[each] > order[node] and each not in needed:
            needed.add(each)
            stack.extend(each.all_input_nodes)
    for each in sorted(needed, key=lambda each: order[each]):
        node.prepend(each)
