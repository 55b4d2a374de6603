"""Filter groups as data: which channels of which modules go together, and how a user selects them.

Shapes: N filters, R channels of one module that belong to one filter.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...errors import UserError

Axis = str
"""`out`, `in`, or `NAME:DIM`, a dimension of a tensor that the module holds (`slicing.tensor_axis`)."""
Kind = Literal["producer", "consumer", "pass"]
SINGLE = "it has a single filter to decide on, which must stay"


@dataclass(frozen=True, eq=False)
class Cut:
    """Channels of one module that go with the filters of a group.

    Args:
        module: qualified name of the module.
        axis: "out" for output channels (also the channels of a normalisation), "in" for input channels, "gamma:0" for
            the first dimension of a parameter, buffer or other tensor `gamma` that the module holds.
        channels: (N, R) int64; row i holds the channels that go with filter i, in ascending order.
        kind: "producer" makes the filters (convolution, linear), "consumer" reads them (convolution, linear,
            recurrent), "pass" keeps channel by channel what it was (normalisation, PReLU, depthwise convolution, a
            vector of one number per channel). A depthwise convolution has one "out" cut; its inputs follow from it.
    """

    module: str
    axis: Axis
    channels: NDArray[np.int64]
    kind: Kind

    def __post_init__(self) -> None:
        if self.channels.ndim != 2 or self.channels.dtype != np.int64:
            raise ValueError(f"channels of {self.module!r} must be an int64 (N, R) array, got {self.channels.shape}.")
        if len(np.unique(self.channels)) != self.channels.size or self.channels.size == 0 or self.channels.min() < 0:
            raise ValueError(f"channels of {self.module!r} must be distinct, not negative and not empty.")


@dataclass(frozen=True)
class Branch:
    """The residual branch of a block, which may vanish: the constant that stays of it, and the layers that go.

    Args:
        chain: the layer that reads the last filters of the branch, and the modules behind it, one after the other, up
            to the one whose output leaves the branch. Fed zeros they put out one number per channel: the constant.
        inside: layers that work for the branch alone, the chain's among them.
        heads: those of `inside` that read the block's input.
        written: whether the network writes into the branch's output (`out += identity`).
    """

    chain: tuple[str, ...]
    inside: tuple[str, ...]
    heads: tuple[str, ...]
    written: bool = False

    @property
    def tail(self) -> str:
        """The module whose output leaves the branch."""
        return self.chain[-1]


@dataclass(frozen=True, eq=False)
class FilterGroup:
    """Filters that can only go together; hashed by identity, so it may be a key of a `dict`.

    Args:
        name: qualified name of the root convolution, the first one to run; without one, of the first linear layer.
        n_filters: N, the number of keep/drop decisions.
        cuts: everything that is cut when a filter goes.
        branch: the residual branch that all of these filters are in, if it may vanish. A mask that keeps none of them
            lets it: the other groups of the branch go as well.
        least: filters that a decision has to keep: 0 where keeping none leaves nothing but a constant of the branch.
    """

    name: str
    n_filters: int
    cuts: tuple[Cut, ...]
    branch: Branch | None = None
    least: int = 1

    def __post_init__(self) -> None:
        wrong = [cut.module for cut in self.cuts if len(cut.channels) != self.n_filters]
        if wrong:
            raise ValueError(f"group {self.name!r} has {self.n_filters} filters, but its cuts at {wrong} do not.")

    @property
    def producers(self) -> tuple[Cut, ...]:
        """Convolutions and linear layers whose outputs these filters are; the root comes first."""
        return tuple(cut for cut in self.cuts if cut.kind == "producer")

    @property
    def consumers(self) -> tuple[Cut, ...]:
        """Convolutions, linear and recurrent layers that read these filters: where a mask belongs."""
        return tuple(cut for cut in self.cuts if cut.kind == "consumer")

    def __str__(self) -> str:
        partners = ", ".join(cut.module for cut in self.producers[1:]) or "nothing"
        readers = ", ".join(cut.module for cut in self.consumers)
        return f"{self.name}: {self.n_filters} filters, coupled with {partners}, read by {readers}"


def vanished(choices: Mapping[FilterGroup, Tensor]) -> tuple[Branch, ...]:
    """The branches that vanish under keep masks (N,) of some groups: those of which one group keeps nothing."""
    emptied = (group.branch for group, keep in choices.items() if not bool(keep.any()))
    return tuple(dict.fromkeys(branch for branch in emptied if branch is not None))


def masked_modules(groups: Iterable[FilterGroup]) -> set[str]:
    """The layers whose weights carry masks of these groups: those that read them, and the last ones of branches."""
    groups = list(groups)
    last = {group.branch.chain[0] for group in groups if group.branch is not None}
    return last | {cut.module for group in groups for cut in group.consumers}


def coupled(choices: Mapping[FilterGroup, Tensor]) -> dict[FilterGroup, Tensor]:
    """The same masks (N,), or (M, N), where a branch of which one group keeps nothing keeps nothing at all."""
    gone: dict[Branch, Tensor] = {}
    for group, keep in choices.items():
        if group.branch is not None:
            empty = ~keep.any(-1, keepdim=True)
            gone[group.branch] = gone[group.branch] | empty if group.branch in gone else empty
    return {
        group: keep if group.branch is None or not bool(gone[group.branch].any()) else keep & ~gone[group.branch]
        for group, keep in choices.items()
    }


@dataclass(frozen=True)
class Skipped:
    """A convolution whose filters are not offered for pruning, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class GroupPlan:
    """All filter groups of a network in execution order, the convolutions left alone, and what a user should know."""

    groups: tuple[FilterGroup, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the prunable groups, in execution order."""
        return tuple(group.name for group in self.groups)


def select_groups(plan: GroupPlan, patterns: Sequence[str] | None) -> tuple[FilterGroup, ...]:
    """Groups whose names match any of the shell-style `patterns`, in execution order; None takes all.

    A pattern that is the very name of a group means that group alone (`conv[4]` is a name before it is a pattern).
    Raises UserError for a pattern that matches nothing: it names the nearest groups, or the reason why the layer was
    skipped, or the group that the layer belongs to.
    """
    if patterns is None:
        if not plan.groups:
            reasons = "; ".join(f"{item.name}: {item.reason}" for item in plan.skipped) or "it has no convolution"
            raise UserError(f"No filter group of this network can be pruned ({reasons}).")
        return plan.groups
    chosen: set[str] = set()
    for pattern in patterns:
        chosen |= matching(plan, pattern)
    if not chosen:
        raise UserError("The list of layers is empty; name at least one, or leave it out for all of them.")
    return tuple(group for group in plan.groups if group.name in chosen)


def matching(plan: GroupPlan, pattern: str) -> set[str]:
    """Names of the groups that a name or a shell-style pattern stands for; UserError, with the nearest, for none."""
    if pattern in plan.names:
        return {pattern}
    matched = {name for name in plan.names if fnmatchcase(name, pattern)}
    if not matched:
        raise UserError(_explain_no_match(plan, pattern))
    return matched


def _explain_no_match(plan: GroupPlan, pattern: str) -> str:
    for item in plan.skipped:
        if pattern == item.name or fnmatchcase(item.name, pattern):
            return f"Layer {item.name!r} cannot be pruned: {item.reason}."
    for group in plan.groups:
        if any(pattern == cut.module or fnmatchcase(cut.module, pattern) for cut in group.producers):
            return f"The filters of layer {pattern!r} go together with group {group.name!r}; ask for {group.name!r}."
    near = difflib.get_close_matches(pattern, plan.names, n=3, cutoff=0.3) or list(plan.names[:3])
    expected = ", ".join(repr(name) for name in near) or "none (no layer of this network can be pruned)"
    return f"No prunable layer is called {pattern!r}; the nearest are {expected}."
