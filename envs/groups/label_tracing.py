"""Label tracing: one run of a network follows every channel from the filter that makes it to the layers reading it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..networks.module_kinds import Inputs, is_extended, is_leaf, run
from .channel_labels import ChannelLabels
from .module_rules import Ownership, apply_module, own_input
from .operator_rules import Labelled, apply_operator, fix_all

# How Python gets at a value: `if x.sum() > 0`, `int(x.argmax())`, `torch.equal(x, y)`.
READS_VALUES = ("_local_scalar_dense", "is_nonzero", "equal")
REACHES_OUTPUT = "its filters are the network's output"


class LabelTrace(TorchDispatchMode):
    """Sees every operator outside known modules; inside them it looks away and the module's own rule applies."""

    def __init__(self) -> None:
        super().__init__()
        self.owners = Ownership(ChannelLabels())
        self._labelled: Labelled = {}
        self._inside = 0
        self._extended: list[tuple[str, nn.Module]] = []
        # Kept, as the labelled ones are, so that an id stays its tensor's own.
        self._data: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then move the labels along."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(id(each) in self._data for each in tree_leaves((args, kwargs))):
            self.owners.reads_values |= not self._inside and func.overloadpacket.__name__ in READS_VALUES
            self.mark_data(out)
        if not self._inside:
            self._note(out, self._follow(func, args, kwargs, out))
        return out

    def mark_data(self, values: Any) -> None:
        """Note that these tensors depend on the network's input."""
        self._data |= {id(value): value for value in tree_leaves(values) if isinstance(value, Tensor)}

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        try:
            source = own_input(self._extended[-1][1], func, args) if self._extended else None
            if source is not None:
                return self._apply_extended(source, out)
            return apply_operator(self.owners.forest, self._labelled, func, args, kwargs, out)
        except Exception as error:
            # An operator used in a way its rule does not foresee costs the filters that touch it, not the network.
            known = [self._labelled[id(each)][1] for each in tree_leaves((args, kwargs)) if id(each) in self._labelled]
            fix_all(self.owners.forest, known, f"the operation {func} cannot be followed here ({error})")
            return None

    def _apply_extended(self, source: Any, out: Any) -> Any:
        """The operator of a subclass with its own `forward` (padding before it, an activation after it)."""
        name, module = self._extended[-1]
        first = out if isinstance(out, Tensor) else out[0]
        _, labels = self._labelled.get(id(source), (None, None))
        result = apply_module(self.owners, name, module, labels, first)
        return result if isinstance(out, Tensor) else [result] + [None] * (len(out) - 1)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of known modules."""
        self._inside += 1

    def leave(self, name: str) -> Callable[..., None]:
        """Forward hook of the known module `name`."""

        def hook(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            self._inside -= 1
            source = args[0] if args else next(iter(kwargs.values()))
            _, labels = self._labelled.get(id(source), (None, None))
            self._note(out, apply_module(self.owners, name, module, labels, out))

        return hook

    def look_into(self, name: str) -> Callable[..., None]:
        """Forward pre-hook of the subclass `name`."""
        return lambda module, args: self._extended.append((name, module))

    def look_away(self, module: nn.Module, args: Any, out: Any) -> None:
        """Forward hook of subclasses."""
        self._extended.pop()

    def fix_outputs(self, outputs: Any) -> None:
        """What the network returns keeps its channels."""
        known = [self._labelled[id(value)][1] for value in tree_leaves(outputs) if id(value) in self._labelled]
        fix_all(self.owners.forest, known, REACHES_OUTPUT)

    def _note(self, out: Any, labels: Any) -> None:
        if isinstance(out, Tensor):
            if isinstance(labels, Tensor):
                # The tensor itself is kept, so that its id stays its own for the length of the trace.
                self._labelled[id(out)] = (out, labels)
        elif isinstance(out, (tuple, list)) and labels is not None:
            for part, part_labels in zip(out, labels, strict=True):
                self._note(part, part_labels)


def trace_labels(model: nn.Module, inputs: Inputs) -> Ownership:
    """Labels of every known module's channels; `model` must be a copy in evaluation mode (hooks come and go)."""
    trace = LabelTrace()
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if is_leaf(module):
            handles.append(module.register_forward_pre_hook(trace.enter))
            handles.append(module.register_forward_hook(trace.leave(name), with_kwargs=True))
        elif is_extended(module):
            handles.append(module.register_forward_pre_hook(trace.look_into(name)))
            handles.append(module.register_forward_hook(trace.look_away))
    try:
        trace.mark_data(inputs)
        with torch.no_grad(), trace:
            trace.fix_outputs(run(model, inputs))
    finally:
        for handle in handles:
            handle.remove()
    return trace.owners
