"""Adapter between a network and what measures it: several inputs in, and of its outputs the one that counts.

Networks answer with a dictionary (`out`, `aux`), a tuple (several tasks), or an object (`.logits` of Hugging Face), and
take pairs, an image and a vector, or keywords (`packing`). An adapted network keeps its modules and their names; its
class becomes a subclass that takes one tensor and gives one: evaluation, training, cost and repair know no other kind.
`as_given` is the way back, to what the user gets, saves and exports.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import MappingKey, SequenceKey, tree_flatten_with_path

from ...errors import UserError
from ..data.packing import Packing
from ..data.randomness import randomness_restored
from .copying import copied
from .inputs import as_call, beside
from .modes import evaluating
from .module_kinds import Inputs, run
from .unwrapping import plain_network

NAMES = ("logits", "out")  # of the output that counts, where nobody says which it is
Output = str | int | Sequence[str | int]
Path = tuple[str, ...]
_ADAPTER, _FORWARD = "_keepdrop_adapter", "_keepdrop_forward"


@dataclass(frozen=True)
class Adapter:
    """How an adapted network of class `base` is called, and what counts of its answer.

    Attributes:
        base: the network's own class.
        paths: the outputs that count; of several each is flattened and they are put side by side, (B, columns). None
            where the answer is one tensor.
        chosen: whether the user said which; then no other output takes part in training either.
        packing: how several inputs lie in one tensor; None for one input.
    """

    base: type[nn.Module]
    paths: tuple[Path, ...] = ()
    chosen: bool = False
    packing: Packing | None = None

    def answer(self, answers: Any, training: bool) -> Any:
        """What counts of a network's answers; in training mode all of them, unless the user said which counts."""
        if not self.paths or _is_tensor(answers) or (training and not self.chosen):
            return answers
        try:
            found = [_at(answers, path) for path in self.paths]
        except (LookupError, AttributeError, ValueError):
            if training:  # it answers otherwise there: which output it is, is found by its values
                return answers
            raise _no_output(self.paths, answers) from None
        return found[0] if len(found) == 1 else torch.cat([each.flatten(1) for each in found], 1)


def ready_network(
    model: Any, images: Tensor | None, output: Output | None = None, packing: Packing | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of the user's network in the form that is pruned: plain (`plain_network`) and adapted (`adapt`).

    Args:
        model: a network, or an object that holds one.
        images: an item or more as the data gives them, (B, C, ...).
        output: which output counts; None takes the usual one.
        packing: of several inputs.

    Returns it with a sentence on everything that was changed or chosen. Raises UserError (see both).
    """
    inputs = images if packing is None or images is None else packing.unpacked(images)
    network, notes = plain_network(model, inputs)
    return network, notes + adapt(network, inputs, output, packing)


def adapt(
    network: nn.Module, example: Inputs | None, output: Output | None = None, packing: Packing | None = None
) -> tuple[str, ...]:
    """Make a network take one tensor and give one, in place, where it does not do so already.

    Args:
        network: a copy of the user's, which may be changed.
        example: what it is called with, unpacked; a network that fails on it is left for others to explain.
        output: a name (`logits`), a position (1), a dotted path (`heads.age.0`) or several of these, which are put side
            by side. None: the answer's `logits` or `out`, else its first tensor with a row for each item.
        packing: of several inputs; the adapted network takes them packed, (B, 1, K).

    Returns a sentence where one of several outputs was chosen. Raises UserError for an output that is not there.
    """
    answers = None if example is None else _answers(network, example)
    paths: tuple[Path, ...] = ()
    note = ""
    if output is not None:
        paths = _paths(output)
        if answers is not None:
            _check(answers, paths)
    elif answers is not None and not isinstance(answers, Tensor):
        paths, note = _usual(answers)
    if not paths and packing is None:
        return ()
    adapter = Adapter(type(network), paths, output is not None, packing)
    made = {"__module__": adapter.base.__module__, "__qualname__": adapter.base.__qualname__}
    own = vars(network).pop("forward", None)  # of this object, which would hide the class's
    if own is not None:
        vars(network)[_FORWARD] = own
    network.__class__ = type(adapter.base.__name__, (adapter.base,), {**made, _ADAPTER: adapter, "forward": _forward})
    return (note,) if note else ()


def as_given(network: nn.Module) -> nn.Module:
    """The network as the user's class has it, with all its outputs; it shares every module with the adapted one."""
    adapter = adapter_of(network)
    if adapter is None:
        return network
    view = copy.copy(network)
    view.__class__ = adapter.base
    own = vars(view).pop(_FORWARD, None)
    if own is not None:
        vars(view)["forward"] = own
    return view


def as_called(network: nn.Module, inputs: Any) -> Any:
    """What the network as given is called with, where `inputs` is what the adapted one takes; else as they are."""
    adapter = adapter_of(network)
    if adapter is None or adapter.packing is None or not isinstance(inputs, Tensor):
        return inputs
    return adapter.packing.unpacked(inputs)


def adapter_of(network: nn.Module) -> Adapter | None:
    """How a network was adapted; None for one that was not."""
    return getattr(type(network), _ADAPTER, None)


def without_say(network: nn.Module, inputs: Inputs) -> frozenset[str]:
    """Names of modules whose weights do not reach the output that counts, of a network that answers with several.

    Nothing that is measured would notice what happens to them. `inputs` is what the network takes, on the CPU.
    """
    adapter = adapter_of(network)
    if adapter is None or not adapter.paths:
        return frozenset()
    trial = copied(network).cpu().eval().requires_grad_(True)
    with torch.inference_mode(False), torch.enable_grad(), randomness_restored():
        answer = run(trial, inputs)
        owned = [(name, value) for name, value in trial.named_parameters() if value.is_floating_point()]
        slopes = torch.autograd.grad(answer.sum(), [value for _, value in owned], allow_unused=True)
    reaching = {name.rpartition(".")[0] for (name, _), slope in zip(owned, slopes, strict=True) if slope is not None}
    return frozenset({name.rpartition(".")[0] for name, _ in owned} - reaching)


def _forward(self: nn.Module, images: Tensor) -> Any:
    adapter: Adapter = getattr(type(self), _ADAPTER)
    args, kwargs = as_call(images if adapter.packing is None else adapter.packing.unpacked(images))
    own = vars(self).get(_FORWARD)
    answers = adapter.base.forward(self, *args, **kwargs) if own is None else own(*args, **kwargs)
    return adapter.answer(answers, self.training)


@torch.no_grad()
def _answers(network: nn.Module, example: Inputs) -> Any:
    """What it answers in evaluation mode; None where it fails."""
    try:
        with evaluating(network), randomness_restored():
            return run(network, beside(network, example))
    except Exception:
        return None


def _paths(output: Output) -> tuple[Path, ...]:
    several = [output] if isinstance(output, str | int) else list(output)
    return tuple(tuple(part for part in str(each).split(".") if part) for each in several)


def _at(answers: Any, path: Path) -> Any:
    """The part of an answer at a path; LookupError, AttributeError or ValueError where there is none."""
    for part in path:
        if isinstance(answers, Mapping):
            keys = {str(key): key for key in answers}
            answers = answers[keys[part]]
        elif isinstance(answers, tuple | list) and part.lstrip("-").isdigit():
            answers = answers[int(part)]
        elif _is_tensor(answers):
            raise LookupError(part)
        else:
            answers = getattr(answers, part)
    return answers


def _usual(answers: Any) -> tuple[tuple[Path, ...], str]:
    """The output that counts, with a sentence where there are several; none where no tensor has a row per item."""
    found = outputs_in(answers)
    if not found:
        return (), ""
    named: list[Path] = [path for name in NAMES for path in found if path == (name,)]
    path = (named or list(found))[0]
    others = ", ".join(".".join(each) for each in found if each != path)
    if not others:
        return (path,), ""
    note = (
        f"The network answers with several outputs: metric and loss take {'.'.join(path)!r}, not {others}; "
        "network.output=NAME (Settings(output=NAME) from Python) takes another one, or several."
    )
    return (path,), note


def outputs_in(answers: Any) -> dict[Path, Tensor]:
    """Floating tensors with a batch axis in an answer, by path, in order."""
    if not isinstance(answers, tuple | list | Mapping) and hasattr(answers, "__dict__"):
        answers = {name: value for name, value in vars(answers).items() if value is not None}
    if isinstance(answers, Mapping):
        answers = dict(answers)  # one of a class of its own, too
    if isinstance(answers, tuple) and hasattr(answers, "_asdict"):
        answers = answers._asdict()
    found = {}
    for path, value in tree_flatten_with_path(answers)[0]:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            found[tuple(map(_name, path))] = value
    return found


def _name(key: Any) -> str:
    if isinstance(key, MappingKey):
        return str(key.key)
    return str(key.idx) if isinstance(key, SequenceKey) else str(getattr(key, "name", key))


def _check(answers: Any, paths: Sequence[Path]) -> None:
    if isinstance(answers, Tensor):
        return  # it answers with one tensor in evaluation mode
    for path in paths:
        try:
            found = _at(answers, path)
        except (LookupError, AttributeError, ValueError):
            raise _no_output([path], answers) from None
        if not isinstance(found, Tensor):
            raise _no_output([path], answers)


def _no_output(paths: Sequence[Path], answers: Any) -> UserError:
    there = ", ".join(f"{'.'.join(path)} {tuple(value.shape)}" for path, value in outputs_in(answers).items())
    return UserError(
        f"The network's answer has no tensor {', '.join(repr('.'.join(path)) for path in paths)}; it holds "
        f"{there or 'none'}; name one of these:",
        python="Settings(output=NAME), or the position of an output.",
        typed="network.output=NAME, or the position of an output.",
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | fx.Proxy)
