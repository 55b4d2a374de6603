"""Graph rewrites of a traced network that change its speed and not its result."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .module_kinds import is_leaf, is_transposed

_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads the value of `node`; None where several do, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def functionalise(traced: fx.GraphModule) -> None:
    """Nothing writes into a value that something else may still read: in-place operations return new tensors.

    Raises ValueError for an assignment into a slice, which has no out-of-place form.
    """
    modules: list[Any] = list(traced.modules())
    for module in modules:
        if getattr(module, "inplace", False) is True:
            module.inplace = False
            _mark_inplace(traced, module)
    for node in traced.graph.nodes:
        if node.target is operator.setitem:
            raise ValueError("it assigns into a slice")
        mutates = node.meta.pop("inplace", False)
        if node.op == "call_function" and node.target in _OUT_OF_PLACE:
            node.target, mutates = _OUT_OF_PLACE[node.target], True
        if node.kwargs.get("inplace") is True:
            node.kwargs, mutates = {**node.kwargs, "inplace": False}, True
        if node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
            node.target, mutates = node.target[:-1], True
            if not hasattr(Tensor, node.target):
                raise ValueError(f"it writes in place by {node.target}_")
        if mutates:
            _rename_later_uses(node.args[0], node)
    traced.recompile()


def _mark_inplace(traced: fx.GraphModule, module: nn.Module) -> None:
    for node in traced.graph.nodes:
        if node.op == "call_module" and traced.get_submodule(node.target) is module:
            node.meta["inplace"] = True


def _rename_later_uses(value: Any, node: fx.Node) -> None:
    """What read `value` after it was overwritten by `node` now reads `node`."""
    if not isinstance(value, fx.Node):
        return
    order = {each: position for position, each in enumerate(node.graph.nodes)}
    value.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node and order[user] > order[node])


def fold_batch_norms(traced: fx.GraphModule) -> None:
    """Convolution followed by batch normalisation becomes one convolution (evaluation mode, each running once)."""
    calls: dict[int, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            key = id(traced.get_submodule(node.target))
            calls[key] = calls.get(key, 0) + 1
    for node in list(traced.graph.nodes):
        conv = _folding_partner(traced, node, calls)
        if conv is not None:
            _fold_pair(traced.get_submodule(str(conv.target)), traced.get_submodule(node.target))
            node.replace_all_uses_with(conv)
            traced.graph.erase_node(node)
    traced.recompile()


def _folding_partner(traced: fx.GraphModule, node: fx.Node, calls: dict[int, int]) -> fx.Node | None:
    if node.op != "call_module" or not isinstance(norm := traced.get_submodule(str(node.target)), _BatchNorm):
        return None
    conv = node.args[0] if node.args else None
    if not isinstance(conv, fx.Node) or conv.op != "call_module" or len(conv.users) != 1:
        return None
    module = traced.get_submodule(str(conv.target))
    if (
        not isinstance(module, _ConvNd)
        or not is_leaf(module)
        or not is_leaf(norm)
        or calls[id(module)] != 1
        or calls[id(norm)] != 1
        or norm.running_mean is None
    ):
        return None
    return None if is_transposed(module) and module.groups > 1 else conv


def _fold_pair(conv: nn.Module, norm: nn.Module) -> None:
    assert isinstance(conv, _ConvNd) and isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None and norm.running_var is not None
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
        transpose=is_transposed(conv),
    )


def reuse_memory(traced: fx.GraphModule) -> None:
    """ReLU and sums write into the fresh result of a layer that nothing else reads."""
    for node in traced.graph.nodes:
        source = node.args[0] if node.args else None
        if is_relu(traced, node) and isinstance(source, fx.Node) and is_fresh(traced, source):
            node.op, node.target, node.args, node.kwargs = "call_function", torch.relu_, (source,), {}
        elif is_sum(node):
            _add_in_place(traced, node)
    traced.recompile()


def _add_in_place(traced: fx.GraphModule, node: fx.Node) -> None:
    for target, other in alike_summands(node):
        if is_fresh(traced, target):
            node.op, node.target, node.args = "call_method", "add_", (target, other)
            return


def is_sum(node: fx.Node) -> bool:
    """A plain sum of two values."""
    if node.op != "call_function" or node.target not in (operator.add, torch.add):
        return False
    return len(node.args) == 2 and not node.kwargs


def alike_summands(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of a sum's two values if they are tensors of one shape (nothing is broadcast), else nothing."""
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
        return []
    shape = a.meta.get("shape")
    return [(a, b), (b, a)] if shape and shape == b.meta.get("shape") else []


def is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    """A ReLU, written in any of the usual ways."""
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))) is nn.ReLU
    if node.op == "call_function":
        return node.target in (functional.relu, torch.relu)
    return node.op == "call_method" and node.target == "relu"


def relu_after(traced: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The ReLU, in place or not, that alone reads the value of `node`; None where something else does."""
    after = only_user(node)
    if after is None or not (is_relu(traced, after) or after.target is torch.relu_):
        return None
    return after if after.args[0] is node else None


def free_name(traced: fx.GraphModule, wanted: str) -> str:
    """A name for a new submodule; `level2.0` and `level2_0` want the same one."""
    while hasattr(traced, wanted):
        wanted += "_"
    return wanted


def exchange(traced: fx.GraphModule, chain: Sequence[fx.Node], place: str, made: nn.Module, *inputs: Any) -> None:
    """Call the module `made` instead of a chain of nodes of which only the last is read.

    It becomes a submodule under the name `place`, or the like. The graph is not recompiled.
    """
    place = free_name(traced, place)
    traced.add_submodule(place, made)
    with traced.graph.inserting_before(chain[-1]):
        new = traced.graph.call_module(place, inputs)
    new.meta = dict(chain[-1].meta)
    chain[-1].replace_all_uses_with(new)
    for old in reversed(chain):
        traced.graph.erase_node(old)


def is_fresh(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the value was just allocated by a layer or a sum, and has a single reader."""
    if len(node.users) != 1:
        return False
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), (_ConvNd, nn.Linear))
    return node.target == "add_" or is_sum(node)
