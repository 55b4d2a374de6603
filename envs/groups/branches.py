"""Branches that may vanish: residual blocks of which nothing but a constant is left once their filters are gone.

One run of the network notes which value is made of which. A group's filters gate a branch if, with the layers that read
them cut off, what the rest of the network still sees of it enters by sums alone (`shortcut + branch`): a gate
(squeeze-excitation), a concatenation or a network without shortcuts is none. What is found is then verified, as every
group is: masked equals cut, here with no filter left.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..networks.copying import copied
from ..networks.hooks import hooked
from ..networks.inputs import tensors_in, tensors_of
from ..networks.module_kinds import Inputs, is_leaf, run
from ..surgery.filter_group import Branch, FilterGroup
from ..surgery.slicing import width
from ..surgery.whole_blocks import can_go, constant, geometry, is_within

SUMS = ("add", "add_")
INPUT = 0


@dataclass(frozen=True)
class _Value:
    """What one operator made: its name, the values it read, and those it wrote over."""

    name: str
    read: tuple[int, ...] = ()
    over: tuple[int, ...] = ()


@dataclass
class _Call:
    """One run of a module: the values made in it are `first` to `last` (exclusive); what it read, what it returned."""

    name: str
    module: nn.Module
    first: int
    source: int | None
    keeps_size: bool = False
    last: int = 0
    result: int | None = None


class _Flow(TorchDispatchMode):
    """Notes every value that depends on the input, and every run of a module."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.values = [_Value("input")]
        self.calls: list[_Call] = []
        self._open: list[tuple[_Call, Tensor | None]] = []
        self._of = {id(value): INPUT for value in tensors_of(inputs)}
        self._alive: list[Any] = [inputs]  # so that an id, and a storage's, stays its tensor's own
        self._sharing: dict[int, list[int]] = defaultdict(list)
        self._written: dict[int, int] = {}
        for value in tensors_of(inputs):
            self._sharing[_storage(value)].append(id(value))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note what it made."""
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        read = {self.value_of(each) for each in given} - {None}
        out = func(*args, **kwargs)
        if read:
            self._note(func, given, read, [each for each in tree_leaves(out) if isinstance(each, Tensor)])
        return out

    def _note(self, func: Any, given: Sequence[Tensor], read: set[Any], out: Sequence[Tensor]) -> None:
        number, mine = len(self.values), {id(each) for each in given}
        written = [each for each in out if id(each) in mine]
        over = {self._of[key] for each in written for key in self._sharing[_storage(each)] if key in self._of}
        self.values.append(_Value(func.overloadpacket.__name__, tuple(sorted(read | over)), tuple(sorted(over))))
        for each in written:
            self._written[_storage(each)] = number
            self._of |= dict.fromkeys(self._sharing[_storage(each)], number)
        for each in out:
            self._alive.append(each)
            self._of[id(each)] = number
            self._sharing[_storage(each)].append(id(each))

    def value_of(self, value: Tensor) -> int | None:
        """The number of the value that a tensor holds now; None if it does not depend on the input."""
        return self._of.get(id(value), self._written.get(_storage(value)))

    def hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Hooks that note the module's runs."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            first = next((each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)), None)
            source = None if first is None else self.value_of(first)
            self._open.append((_Call(name, module, len(self.values), source), first))

        def leave(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            call, first = self._open.pop()
            call.last = len(self.values)
            if isinstance(out, Tensor) and first is not None:
                call.result = self.value_of(out)
                call.keeps_size = first.dim() == out.dim() > 1 and (
                    first.shape[2:] == out.shape[2:] or first.shape[:-1] == out.shape[:-1]
                )
            self.calls.append(call)

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave, with_kwargs=True)


def find_branches(model: nn.Module, inputs: Inputs, groups: Sequence[FilterGroup]) -> tuple[FilterGroup, ...]:
    """The same groups, those in a branch that may vanish with their `branch` and, if they gate it, `least` 0.

    Nothing is verified here. A network that cannot be followed has no such branch.
    """
    try:
        flow, outputs = _followed(model, inputs)
    except Exception:
        return tuple(groups)
    return _Search(model, flow, outputs, groups).marked()


def _followed(model: nn.Module, inputs: Inputs) -> tuple[_Flow, list[int | None]]:
    probe = nn.Module.cpu(copied(model)).eval()
    flow = _Flow(inputs)
    with hooked(probe, flow.hooks), torch.no_grad(), flow:
        outputs = tensors_in(run(probe, inputs))
    return flow, [flow.value_of(each) for each in outputs]


@dataclass
class _Gate:
    """A group whose readers cut a branch off: the values behind them, and those that enter sums from there."""

    group: FilterGroup
    readers: list[_Call]
    behind: set[int]
    ends: set[int]
    tails: list[_Call] = field(default_factory=list)


class _Search:
    """Looks for branches in one run of a network."""

    def __init__(
        self, model: nn.Module, flow: _Flow, outputs: Sequence[int | None], groups: Sequence[FilterGroup]
    ) -> None:
        self._model, self._values, self._groups = model, flow.values, groups
        self._calls = flow.calls  # in the order in which they ended
        self._outputs = [each for each in outputs if each is not None]
        self._runs = Counter(id(call.module) for call in self._calls)
        names = Counter(id(each) for _, each in model.named_modules(remove_duplicate=False))
        self._shared = {name for name, each in model.named_modules() if names[id(each)] > 1}
        self._readers: dict[int, list[int]] = defaultdict(list)
        for number, value in enumerate(self._values):
            for each in value.read:
                self._readers[each].append(number)

    def marked(self) -> tuple[FilterGroup, ...]:
        """The groups with their branches."""
        gates = [gate for group in self._groups if (gate := self._gate(group)) is not None]
        chains: dict[int, tuple[_Call, tuple[str, ...]]] = {}
        for gate in gates:
            gate.tails = [call for call in reversed(self._calls) if self._is_tail(call, gate)]
            for tail in gate.tails:
                chain = self._chain(tail, gate.readers)
                if chain and (id(tail) not in chains or len(chain) < len(chains[id(tail)][1])):
                    chains[id(tail)] = (tail, chain)
        branches = {key: self._branch(tail, chain) for key, (tail, chain) in chains.items()}
        found: dict[FilterGroup, Branch] = {}
        for gate in gates:
            made = [branch for tail in gate.tails if (branch := branches.get(id(tail))) is not None]
            if made:
                found[gate.group] = made[0]
        return tuple(self._with_branch(group, found) for group in self._groups)

    def _with_branch(self, group: FilterGroup, found: dict[FilterGroup, Branch]) -> FilterGroup:
        if group in found:
            return replace(group, branch=found[group], least=0)
        around = [
            each
            for each in dict.fromkeys(found.values())
            if all(is_within(cut.module, (*each.inside, each.tail)) for cut in group.cuts)
        ]
        return replace(group, branch=min(around, key=lambda each: len(each.inside))) if around else group

    def _gate(self, group: FilterGroup) -> _Gate | None:
        modules = {cut.module: cut for cut in group.consumers}
        if any(cut.channels.size != width(self._model.get_submodule(name), cut.axis) for name, cut in modules.items()):
            return None
        readers = [call for call in self._calls if call.name in modules]
        shut = {number for call in readers for number in range(call.first, call.last)}
        seen = self._forward(shut)
        if not shut or not all(each in seen for each in self._outputs):
            return None
        ends = set()
        for number in seen:
            dark = [each for each in self._values[number].read if each not in seen]
            if dark and (self._values[number].name not in SUMS or len(dark) == len(self._values[number].read)):
                return None
            ends.update(dark)
        return _Gate(group, readers, set(range(len(self._values))) - seen, ends) if ends else None

    def _forward(self, shut: Collection[int]) -> set[int]:
        seen, stack = {INPUT}, [INPUT]
        while stack:
            for number in self._readers[stack.pop()]:
                if number not in seen and number not in shut:
                    seen.add(number)
                    stack.append(number)
        return seen

    def _backward(self, starts: Iterable[int], at: int) -> set[int]:
        """Everything that `starts` are made of, looking no further back than the value `at`."""
        seen, stack = set(), list(starts)
        while stack:
            number = stack.pop()
            if number not in seen:
                seen.add(number)
                stack.extend(self._values[number].read if number != at else ())
        return seen

    def _is_tail(self, call: _Call, gate: _Gate) -> bool:
        """Whether everything that leaves the branch of `gate` comes through what this call returns."""
        if call.result not in gate.behind or not self._is_single(call) or call.source is None:
            return False
        if call not in gate.readers:
            if any(call.first <= reader.first and reader.last <= call.last for reader in gate.readers):
                return False
            if not (call.keeps_size or (can_go(call.module) and geometry(call.module))):
                return False
        elif len(gate.readers) > 1 or not (is_leaf(call.module) and can_go(call.module)):
            return False
        around = self._backward(gate.ends, call.result) - {call.result}
        return not any(reader.first <= number < reader.last for reader in gate.readers for number in around)

    def _is_single(self, call: _Call) -> bool:
        return self._runs[id(call.module)] == 1 and call.name not in self._shared

    def _chain(self, tail: _Call, readers: Sequence[_Call]) -> tuple[str, ...]:
        """Modules from the one reader to the tail, each of which reads what the one before returned; or nothing."""
        chain = [tail]
        while chain[0] not in readers:
            source = chain[0].source
            makers = [
                call
                for call in self._calls
                if source is not None and call.result == source and call.first <= source < call.last
            ]
            if not makers:
                return ()
            chain.insert(0, min(makers, key=lambda call: call.last - call.first))
        fits = len(readers) == 1 and is_leaf(chain[0].module) and can_go(chain[0].module)
        return tuple(call.name for call in chain) if fits else ()

    def _branch(self, tail: _Call, chain: tuple[str, ...]) -> Branch | None:
        """The branch that ends in `tail`; None where its layers work for others as well, or it adds no constant."""
        assert tail.result is not None
        # What the tail returns may be what it read (a dropout), which is then made for it alone.
        live = self._backward(self._outputs, tail.result) - {tail.result}
        dead: list[_Call] = []
        for call in self._calls[: self._calls.index(tail)]:
            if not any(call.module.children()) and self._is_dead(call, live):
                if any(True for _ in call.module.parameters()) and not self._is_single(call):
                    return None
                if can_go(call.module) and self._is_single(call) and not is_within(call.name, [tail.name]):
                    dead.append(call)
        written = any(tail.result in value.over for value in self._values)
        heads = self._heads(dead, live)
        branch = Branch(chain, tuple(call.name for call in dead), heads, written)
        try:
            constant(self._model, branch)
        except ValueError:
            return None
        return branch

    def _is_dead(self, call: _Call, live: Collection[int]) -> bool:
        if call.first == call.last:
            return call.source is not None and call.source not in live
        return not any(number in live for number in range(call.first, call.last))

    def _heads(self, dead: Sequence[_Call], live: Collection[int]) -> tuple[str, ...]:
        """Of the layers that go, in order, those that read something else than what another one has left."""
        hollow: set[int] = set()
        inner = {number for call in dead for number in range(call.first, call.last)}
        for number, value in enumerate(self._values):
            if number in inner or (value.read and number not in live and hollow.issuperset(value.read)):
                hollow.add(number)
        return tuple(call.name for call in dead if call.source not in hollow)


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata
