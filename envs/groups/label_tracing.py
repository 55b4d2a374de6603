"""Label tracing: one run of a network follows every channel from the filter that makes it to the layers reading it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ...errors import summarised
from ..data.randomness import random_states, randomness_restored
from ..networks.hooks import hooked
from ..networks.inputs import resized, tensors_in
from ..networks.modes import modes_restored
from ..networks.module_kinds import Inputs, is_attention, is_extended, is_leaf, is_recurrent, run
from .channel_labels import ChannelLabels, compress, varying
from .module_rules import (
    ATTENTION,
    STATE,
    Ownership,
    apply_made_conv,
    apply_module,
    fix_all,
    label_held,
    own_held,
    own_input,
    own_weight,
)
from .operator_rules import CONSTRUCTORS, Labelled, apply_operator, of_first, words

# How Python gets at a value: `if x.sum() > 0`, `int(x.argmax())`, `torch.equal(x, y)`.
READS_VALUES = ("_local_scalar_dense", "is_nonzero", "equal")
# Operators whose result shares memory with their first argument.
VIEWS = words(
    """view slice select narrow permute transpose t expand squeeze unsqueeze split split_with_sizes chunk unbind alias
    detach unfold movedim"""
)
REACHES_OUTPUT = "its filters are the network's output"

Shapes = list[tuple[int, ...]]


class LabelTrace(TorchDispatchMode):
    """Sees every operator outside known modules; inside them it looks away and the module's own rule applies.

    Args:
        owners: where the labels go; those of an earlier trace stay, and both are tied.
    """

    def __init__(self, owners: Ownership) -> None:
        super().__init__()
        self.owners = owners
        self.ran: set[str] = set()  # known modules and subclasses of them
        self.draws: list[str] = []  # random operators, with the module that called them
        self._labelled: Labelled = dict(owners.held)
        self._inside = 0
        self._extended: list[tuple[str, nn.Module]] = []
        self._path: list[str] = []
        self._blanks = Blanks()
        # Kept, as the labelled ones are, so that an id stays its tensor's own.
        self._data: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then move the labels along."""
        kwargs = kwargs or {}
        stays = func.overloadpacket.__name__ == "as_strided_" and _stays_in_place(*args, **kwargs)
        out = func(*args, **kwargs)
        if any(id(each) in self._data for each in tree_leaves((args, kwargs))):
            self.owners.reads_values |= not self._inside and func.overloadpacket.__name__ in READS_VALUES
            self.mark_data(out)
        if torch.Tag.nondeterministic_seeded in func.tags and not attends_plainly(func, args, kwargs):
            place = self._path[-1] if self._path else ""
            self.draws.append(f"{func.overloadpacket.__name__!r}" + (f" in {place!r}" if place else ""))
        if not self._inside and not stays:
            labels = self._follow(func, args, kwargs, out)
            self._note(out, labels)
            self._blanks.follow(func, args, kwargs, out, labels)
        return out

    def mark_data(self, values: Any) -> None:
        """Note that these tensors depend on the network's input."""
        self._data |= {id(value): value for value in tree_leaves(values) if isinstance(value, Tensor)}

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        try:
            source = own_input(self._extended[-1][1], func, args) if self._extended else None
            if source is not None:
                return self._apply_extended(source, out)
            made = self._made_weight(func, args)
            if made is not None:
                name, module = self._extended[-1]
                assert isinstance(module, _ConvNd)
                return apply_made_conv(self.owners, name, module, self._labels_of(args[0]), made, out)
            for value in filter(self._blanks.has, tree_leaves((args, kwargs))):
                self._labelled[id(value)] = (value, self._blanks.labels(value))
            return apply_operator(self.owners.forest, self._labelled, self._data, func, args, kwargs, out)
        except Exception as error:
            # An operator used in a way its rule does not foresee costs the filters that touch it, not the network.
            known = [self._labelled[id(each)][1] for each in tree_leaves((args, kwargs)) if id(each) in self._labelled]
            fix_all(self.owners.forest, known, f"the operation {func} cannot be followed here ({error})")
            return None

    def _labels_of(self, value: Any) -> Tensor | None:
        if self._blanks.has(value):
            return self._blanks.labels(value)
        return self._labelled[id(value)][1] if id(value) in self._labelled else None

    def _made_weight(self, func: Any, args: Any) -> list[Tensor | None] | None:
        """Labels of weight and bias, if this is the convolution of a module that makes its weight filter by filter."""
        weight = own_weight(self._extended[-1][1], func, args) if self._extended else None
        labels = None if weight is None else self._labels_of(weight)
        return None if labels is None or varying(labels) != [0] else [labels, self._labels_of(args[2])]

    def _apply_extended(self, source: Any, out: Any) -> Any:
        """The operator of a subclass with its own `forward` (padding before it, an activation after it)."""
        name, module = self._extended[-1]
        first = out if isinstance(out, Tensor) else out[0]
        return of_first(apply_module(self.owners, name, module, self._labels_of(source), first), out)

    def hooks(self, name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks that tell where the trace is, and hand known modules and their subclasses to their rules."""
        yield module.register_forward_pre_hook(lambda module, args: self._path.append(name))
        if is_leaf(module) or is_recurrent(module) or is_attention(module):
            yield module.register_forward_pre_hook(self._enter)
            yield module.register_forward_hook(self._leave(name), with_kwargs=True)
        elif is_extended(module):
            yield module.register_forward_pre_hook(self._look_into(name))
            yield module.register_forward_hook(self._look_away)
        yield module.register_forward_hook(lambda module, args, out: self._end())

    def _end(self) -> None:
        self.ran.add(self._path.pop())

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside += 1

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            self._inside -= 1
            source = args[0] if args else next(iter(kwargs.values()))
            if is_recurrent(module) or is_attention(module):
                others = [self._labels_of(each) for each in tensors_in((args, kwargs)) if each is not source]
                fix_all(self.owners.forest, others, ATTENTION if is_attention(module) else STATE)
            self._note(out, apply_module(self.owners, name, module, self._labels_of(source), out))

        return hook

    def _look_into(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._extended.append((name, module))

    def _look_away(self, module: nn.Module, args: Any, out: Any) -> None:
        self._extended.pop()

    def fix_outputs(self, outputs: Any) -> None:
        """What the network returns keeps its channels."""
        fix_all(self.owners.forest, [self._labels_of(value) for value in tensors_in(outputs)], REACHES_OUTPUT)

    def _note(self, out: Any, labels: Any) -> None:
        if isinstance(out, Tensor):
            if isinstance(labels, Tensor):
                # The tensor itself is kept, so that its id stays its tensor's own for the length of the trace.
                self._labelled[id(out)] = (out, labels)
        elif isinstance(out, (tuple, list)) and labels is not None:
            for part, part_labels in zip(out, labels, strict=True):
                self._note(part, part_labels)


def attends_plainly(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator is torch's attention, which would draw random numbers only for a dropout of its own."""
    if "scaled_dot_product" not in func.overloadpacket.__name__:
        return False
    names = [each.name for each in func._schema.arguments]
    return not {**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0.0)


class Blanks:
    """Tensors made from nothing but a size, and views of them: what is written into a view is seen in the whole.

    Their labels lie in memory as the values do, so that the same operators make the same views.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def has(self, value: Any) -> bool:
        """Whether `value` is such a tensor or view."""
        return id(value) in self._known

    def labels(self, value: Tensor) -> Tensor:
        """Its labels as they are now."""
        return compress(self._known[id(value)][1])

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any, labels: Any) -> None:
        """Note what an operator, which gave `out` these labels, made, looked at or wrote."""
        name, source = func.overloadpacket.__name__, args[0] if args else None
        if name in CONSTRUCTORS:
            if isinstance(out, Tensor) and isinstance(labels, Tensor):
                self._known[id(out)] = (out, labels.contiguous())
        elif self.has(source):
            own = self._known[id(source)][1]
            if name in VIEWS:
                for value, part in zip(tree_leaves(out), tree_leaves(func(own, *args[1:], **kwargs)), strict=True):
                    self._known[id(value)] = (value, part)
            elif out is source and isinstance(labels, Tensor):
                own.copy_(labels)


def _stays_in_place(value: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> bool:
    """Whether every number stays where it is: convolutions of one image in channels-last order set strides so."""
    if tuple(value.shape) != tuple(size) or offset not in (None, value.storage_offset()):
        return False
    return all(a == b or n == 1 for n, a, b in zip(value.shape, value.stride(), stride, strict=True))


def trace_labels(model: nn.Module, inputs: Inputs) -> Ownership:
    """Labels of every known module's channels; `model` must be a copy (its mode changes, hooks come and go).

    The network is followed in evaluation mode, and once more in training mode if modules run only there (auxiliary
    heads): what they read is then tied to it. A network that does not train on these inputs alone is not followed.
    """
    owners = Ownership(ChannelLabels())
    label_held(owners, model)
    before = random_states()
    trace = _follow(model.eval(), inputs, owners)
    for name, state in random_states().items():
        if state != before[name]:
            owners.draws += tuple(dict.fromkeys(trace.draws)) if name == "torch" else (name,)
    try:
        with randomness_restored():
            ran, owners.trained = _run_in_training(model, inputs)
            owners.training_only = ran - trace.ran
            if owners.training_only:
                _follow(model.train(), resized(inputs, 2), owners)
    except Exception as error:
        owners.why_not_trained = summarised(error)
    finally:
        model.eval()
    own_held(owners)
    return owners


def _follow(model: nn.Module, inputs: Inputs, owners: Ownership) -> LabelTrace:
    trace = LabelTrace(owners)
    with hooked(model, trace.hooks), torch.no_grad():
        trace.mark_data(inputs)
        with trace:
            trace.fix_outputs(run(model, inputs))
    return trace


def shapes_of(values: Sequence[Tensor]) -> Shapes:
    """Shapes of tensors."""
    return [tuple(value.shape) for value in values]


def shapes_in_training(model: nn.Module, inputs: Inputs) -> Shapes:
    """Shapes of what a network answers to two images in training mode, where batch normalisation asks for that many."""
    with torch.no_grad(), modes_restored(model), randomness_restored():
        return shapes_of(tensors_in(run(model.train(), resized(inputs, 2))))


def _run_in_training(model: nn.Module, inputs: Inputs) -> tuple[set[str], Shapes]:
    """Names of the modules that run in training mode, and the shapes of the answer."""
    ran: set[str] = set()

    def hooks(name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        yield module.register_forward_hook(lambda module, args, out: ran.add(name))

    with hooked(model, hooks):
        return ran, shapes_in_training(model, inputs)
