"""Meters: what a network costs (MACs, parameters, bytes of its weights) by filters kept per group.

`LatencyMeter` in `latency_meter.py` is the one of seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..networks.cost import Cost
from .filter_group import Branch, FilterGroup
from .slicing import axes_of_parameter, width
from .whole_blocks import constant, is_within

Unit = Literal["params", "bytes"]
STATISTICS = ("running_mean", "running_var")


class Meter(Protocol):
    """Counts one resource of a network whose groups keep some of their filters.

    Attributes:
        groups: the groups that may be pruned; counts of kept filters come in this order.
        whole: cost of the network that keeps them all, in the meter's unit.
    """

    groups: tuple[FilterGroup, ...]
    whole: float

    def cost(self, kept: Sequence[int]) -> float:
        """What is left when the group at position i keeps `kept[i]` filters; never less for more filters."""
        ...


Clock = Callable[[nn.Module, Sequence[FilterGroup]], Meter]
"""Makes the meter of seconds of a dense network, for some of its groups."""


def removed(meter: Meter, kept: Sequence[int]) -> float:
    """The fraction of `meter.whole` that is gone."""
    return 1.0 - meter.cost(kept) / meter.whole


@dataclass(frozen=True)
class _Share:
    """An amount, and how it shrinks along each axis: (position of a group, share of one of its filters).

    It goes as a whole with each of `branches`; with `stands_for` it is there only once that branch has vanished.
    """

    amount: float
    axes: tuple[tuple[tuple[int, float], ...], ...]
    branches: tuple[Branch, ...] = ()
    stands_for: Branch | None = None

    def at(self, dropped: Sequence[int]) -> float:
        """What is left when that many filters of each group are gone."""
        left = self.amount
        for axis in self.axes:
            left = left * (1.0 - sum(share * dropped[position] for position, share in axis))
        return left


class _SummedMeter:
    """A cost that is a sum of products of what is left along axes."""

    def __init__(self, groups: Sequence[FilterGroup]) -> None:
        self.groups = tuple(groups)
        self.whole: float = 0
        self._shares: list[_Share] = []

    def cost(self, kept: Sequence[int]) -> float:
        """What is left when the group at position i keeps `kept[i]` filters."""
        dropped = [group.n_filters - n for group, n in zip(self.groups, kept, strict=True)]
        gone = {group.branch for group, n in zip(self.groups, kept, strict=True) if n == 0} - {None}
        if not gone:
            return sum(share.at(dropped) for share in self._shares if share.stands_for is None)
        return sum(share.at(dropped) for share in self._shares if _stays(share, gone))

    def _branches(self, name: str) -> tuple[Branch, ...]:
        """The branches that a module is in."""
        known = dict.fromkeys(group.branch for group in self.groups if group.branch is not None)
        return tuple(branch for branch in known if is_within(name, (*branch.inside, branch.tail)))

    def _axis(self, model: nn.Module, name: str, axis: str) -> tuple[tuple[int, float], ...]:
        return tuple(
            (position, cut.channels.shape[1] / width(model.get_submodule(name), axis))
            for position, group in enumerate(self.groups)
            for cut in group.cuts
            if cut.module == name and cut.axis == axis
        )


def _stays(share: _Share, gone: Collection[Branch | None]) -> bool:
    if share.stands_for is not None:
        return share.stands_for in gone
    return not any(each in gone for each in share.branches)


class MacsMeter(_SummedMeter):
    """MACs per image by filters kept per group: `group_cost.pruned_cost` made fast enough to search with.

    Args:
        model: the network the groups were found in.
        cost: its `count_cost`.
        groups: the groups that may be pruned.
        of: whose MACs are counted, as in `Target`.
    """

    def __init__(self, model: nn.Module, cost: Cost, groups: Sequence[FilterGroup], of: str = "groups") -> None:
        super().__init__(groups)
        producers = {cut.module for group in groups for cut in group.producers}
        counted = producers if of == "groups" else set(cost.modules)
        self._shares = [
            _Share(module.macs, (self._axis(model, name, "out"), self._axis(model, name, "in")), self._branches(name))
            for name, module in cost.modules.items()
            if name in counted
        ]
        self.whole = sum(share.amount for share in self._shares)


class WeightsMeter(_SummedMeter):
    """Parameters, or bytes of the weights file, by filters kept per group; what layers share counts once.

    Args:
        model: the network the groups were found in.
        groups: the groups that may be pruned.
        unit: "params", or "bytes" of `model.safetensors`: buffers and the file's header too, the latter at the size it
            has for the whole network (a pruned one's is a few digits shorter, so that a limit in bytes holds).
    """

    def __init__(self, model: nn.Module, groups: Sequence[FilterGroup], unit: Unit = "params") -> None:
        super().__init__(groups)
        seen: set[int] = set()
        cut_axes: dict[str, set[str]] = {}
        for cut in (cut for group in groups for cut in group.cuts):
            cut_axes.setdefault(cut.module, set()).add(cut.axis)
        for name, module in nn.Module.named_modules(model):
            for key, value in _tensors(module, unit):
                if id(value) in seen and unit == "params":
                    continue
                seen.add(id(value))
                known = ("out",) if key in STATISTICS else axes_of_parameter(module, key)
                axes = [*known, *(axis for axis in cut_axes.get(name, ()) if axis.startswith(f"{key}:"))]
                shares = tuple(self._axis(model, name, axis) for axis in axes if axis in cut_axes.get(name, ()))
                amount = value.numel() * (value.element_size() if unit == "bytes" else 1)
                self._shares.append(_Share(amount, shares, self._branches(name)))
        for branch in dict.fromkeys(group.branch for group in groups if group.branch is not None):
            ends = [name for name in branch.chain if cut_axes.get(name, set()) & {"out"}]
            value = constant(model, branch)
            amount = len(value) * (value.element_size() if unit == "bytes" else 1)
            out = (self._axis(model, ends[-1], "out"),) if ends else ()
            self._shares.append(_Share(amount, out, stands_for=branch))
        if unit == "bytes":
            self._shares.append(_Share(_header(model), ()))
        self.whole = sum(share.amount for share in self._shares if share.stands_for is None)


def _tensors(module: nn.Module, unit: Unit) -> Iterable[tuple[str, Tensor]]:
    """What a module itself holds: its parameters, and where bytes count the buffers that are saved."""
    yield from nn.Module.named_parameters(module, recurse=False)
    if unit == "bytes":
        for key, value in nn.Module.named_buffers(module, recurse=False):
            if key not in module._non_persistent_buffers_set:
                yield key, value


def _header(model: nn.Module) -> int:
    """Bytes of a weights file beside the tensors."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    return len(save_tensors(tensors)) - sum(value.numel() * value.element_size() for value in tensors.values())
