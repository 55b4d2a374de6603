"""A network cut in two: what does not depend on any mask is computed once, only the rest runs per mask.

Masks are folded into the weights of the consumers (`folding`), so a mask costs one pass through the suffix and no copy
of any activation; channels that a mask leaves unread are neither read nor computed where that is possible. Networks
that `torch.fx` cannot trace run whole, with the same folding and the same results.

Shapes: M masks, N filters, B images, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...errors import UserError
from ..surgery.filter_group import FilterGroup
from ..surgery.folding import by_input, fold, fold_all, from_input, mixing_obstacle
from ..surgery.masking import MixKey
from .cudnn_conv import fuse_relu
from .fused_conv import FusedConv
from .graph_partition import Frontier, GraphPartition, cut_again, split, whole
from .stacked_suffix import stacked_suffix

METHODS = ("auto", "split", "whole")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MaskedNetwork:
    """Runs a network under keep masks of some of its groups.

    Args:
        model: the network; it is copied, never changed. It takes one tensor and returns logits (B, C).
        groups: the groups whose masks will vary.
        example: (B, ...) a few images; used to find out which values are per image and to check the split.
        method: "split" (traced, with a frontier), "whole" (every mask runs everything), or "auto": split if possible.
        dtype: "float32" or "bfloat16": in what everything is computed.
        compile: run the suffix through `torch.compile`, in place of the fused convolutions.
        stack: run many masks in one batch where the network allows it (`stacked`); None does so on a GPU.

    `method` says which one is used, `why_whole` the reason if it is not "split", `stacks` whether masks run in one
    batch.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[FilterGroup],
        example: Tensor,
        *,
        method: str = "auto",
        dtype: str = "float32",
        compile: bool = False,
        stack: bool | None = None,
    ) -> None:
        if method not in METHODS:
            raise UserError(f"The evaluation method must be one of {', '.join(METHODS)}, got {method!r}.")
        if dtype not in DTYPES:
            raise UserError(f"The dtype of evaluation must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.why_whole = "it was asked for" if method == "whole" else ""
        self.compile = compile
        self._stack = example.device.type != "cpu" if stack is None else stack
        partition = None if method == "whole" else self._split(model, groups, example, method)
        self.method = "whole" if partition is None else "split"
        self.dtype = DTYPES[dtype]
        self._adopt(groups, partition or whole(model))
        if self.dtype != torch.float32:
            self._cast(example)
        self._set_up_stack((example,))

    def _split(
        self, model: nn.Module, groups: Sequence[FilterGroup], example: Tensor, method: str
    ) -> GraphPartition | None:
        try:
            return split(model, groups, example, fusing=self._fusing)
        except Exception as error:
            if method == "split":
                raise UserError(f'The network cannot be split ({error}); use method "whole" or "auto".') from error
            self.why_whole = f"the network cannot be split ({error})"
            return None

    def _adopt(self, groups: Sequence[FilterGroup], partition: GraphPartition) -> None:
        self.groups, self._halves = tuple(groups), partition
        names = {cut.module for group in groups for cut in group.consumers}
        self._weights = {name: _weight(partition.masked, name).detach().clone() for name in names}
        self._run = torch.compile(partition.suffix, dynamic=False) if self.compile else partition.suffix

    @property
    def _fusing(self) -> bool:
        return not self.compile and not self._stack

    def _set_up_stack(self, example: Frontier) -> None:
        """Masks in one batch, if that is wished and possible; on a GPU everything in as few kernels as possible."""
        self._stacked = None
        if self._stack and isinstance(self._halves.suffix, fx.GraphModule):
            self._stacked = stacked_suffix(self._halves.suffix, self.prefix(*example), self._weights)
        if self.compile:
            if self._stacked is not None:
                self._stacked.run = torch.compile(self._stacked.graph, dynamic=False)
        elif example[0].is_cuda:
            stacked = None if self._stacked is None else self._stacked.graph
            for graph in (self._halves.prefix, self._halves.suffix, stacked):
                if isinstance(graph, fx.GraphModule):
                    fuse_relu(graph)

    def _cast(self, example: Tensor) -> None:
        partition = self._halves
        for part in (partition.prefix, partition.suffix, partition.masked, partition.behind, partition.source):
            if isinstance(part, nn.Module):
                part.to(self.dtype)
        for fused in partition.fused.values():
            fused.cast(self.dtype)
        try:
            with torch.inference_mode():
                partition.suffix(*self.prefix(example))
        except RuntimeError as error:
            raise UserError(f"The network cannot be evaluated in {self.dtype} ({error}); use float32.") from error

    @torch.inference_mode()
    def prefix(self, *images: Tensor) -> Frontier:
        """Every value that no mask changes and the suffix reads: tensors with B rows each.

        Takes the images; an `advanced` network takes the frontier it advanced from.
        """
        return self._halves.prefix(*(value.to(self.dtype) for value in images))

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
        return _Folded(self, self._folded(masks, index, mixes or {}))

    @property
    def stacks(self) -> bool:
        """Whether `together` can run."""
        return self._stacked is not None

    @torch.no_grad()
    def together(
        self, masks: Mapping[str, Tensor], mixes: Mapping[MixKey, Tensor] | None = None
    ) -> Callable[[Frontier], Tensor]:
        """Runs the suffix under all M masks in one batch: logits (M, B, C) of a frontier; arguments as for `suffix`."""
        stacked, n_masks = self._stacked, len(next(iter(masks.values())))
        if stacked is None:
            raise ValueError("this network's masks run one by one; see `stacks`.")
        weights = {name: weight.expand(n_masks, *weight.shape).clone() for name, weight in self._weights.items()}
        for group in self.groups:
            for cut in group.consumers if group.name in masks else ():
                choices = (mixes or {}).get((group.name, cut.module), masks[group.name])
                fold_all(weights[cut.module], cut, choices)
        return torch.inference_mode()(lambda frontier: stacked(frontier, weights))

    def advanced(
        self,
        masks: Mapping[str, Tensor],
        mixes: Mapping[MixKey, Tensor] | None,
        example: Frontier,
        *,
        from_frontier: bool,
    ) -> MaskedNetwork:
        """This network with some groups decided, (1, N) bool a group: its frontier lies behind them.

        Args:
            masks: what is decided; the groups left can still be masked.
            mixes: (1, N, N) each, as for `masked`.
            example: a few rows of this network's frontier, or of its images.
            from_frontier: which of the two; the new network's `prefix` takes the same.
        """
        folded = self._folded(masks, 0, mixes or {})
        decided = {name: (self._zeroed(name, weight, read), read) for name, (weight, read) in folded.items()}
        rest = [group for group in self.groups if group.name not in masks]
        source = self._halves.behind if from_frontier else self._halves.source
        traced, whole_halves = copy.deepcopy(source), copy.deepcopy(self._halves) if source is None else self._halves
        with torch.no_grad():
            for name, (weight, _) in decided.items():
                _weight(whole_halves.masked if traced is None else traced, name).copy_(weight)
        network = copy.copy(self)
        network._adopt(rest, whole_halves if traced is None else cut_again(traced, rest, example, fusing=self._fusing))
        # In full precision, which the copy of a network that was cast has lost.
        kept = {name: decided[name][0] if name in decided else self._weights[name] for name in network._weights}
        network._weights = {name: weight.clone() for name, weight in kept.items()}
        network._install(decided)
        network._set_up_stack(example)
        return network

    def _folded(
        self, masks: Mapping[str, Tensor], index: int, mixes: Mapping[MixKey, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Consumer -> its weights under a mask, and which input channels they still read, (C,) bool.

        What a plain mask drops is not yet zero in the weights: most are never looked at again (`_zeroed`).
        """
        folded: dict[str, tuple[Tensor, Tensor]] = {}
        for group in self.groups:
            for cut in group.consumers if group.name in masks else ():
                mix = mixes.get((group.name, cut.module))
                module = self._halves.masked.get_submodule(cut.module)
                if mix is not None and (why := mixing_obstacle(module, cut)):
                    raise ValueError(f"a mix cannot be applied at {cut.module!r}: {why}.")
                choice = masks[group.name][index] if mix is None else mix[index]
                weight, read = folded.get(cut.module) or self._untouched(cut.module)
                used = choice.cpu() if mix is None else (choice != 0).any(0).cpu()
                read[torch.from_numpy(cut.channels)[~used].flatten()] = False
                folded[cut.module] = weight if mix is None else fold(module, weight, cut, mix[index]), read
        return folded

    def _zeroed(self, name: str, weight: Tensor, read: Tensor) -> Tensor:
        """Weights of a consumer that ignore the input channels not in `read`."""
        if bool(read.all()):
            return weight
        module = self._halves.masked.get_submodule(name)
        first = by_input(module, weight).clone(memory_format=torch.preserve_format)
        first[~read.to(weight.device)] = 0
        return from_input(module, first)

    def _untouched(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self._weights[name]
        n_channels = len(by_input(self._halves.masked.get_submodule(name), weight))
        return weight, torch.ones(n_channels, dtype=torch.bool)

    def _install(self, folded: Mapping[str, tuple[Tensor, Tensor]]) -> list[FusedConv]:
        """Put weights where the halves read them; returns the fused convolutions that were changed."""
        orders: dict[FusedConv, dict[str, Any]] = {}
        for name, (weight, read) in folded.items():
            fused = self._halves.fused.get(name)
            if fused is None or fused.n_groups > 1 or not bool(read.any()):
                weight = self._zeroed(name, weight, read)
            if fused is None:
                _weight(self._halves.masked, name).copy_(weight)
                continue
            reads = None if fused.n_groups > 1 or bool(read.all()) else _some(read)
            feeder = None if reads is None else self._halves.feeders.get(fused)
            orders.setdefault(fused, {}).update(weight=weight, reads=reads, narrow=feeder is not None)
            if feeder is not None:
                orders.setdefault(feeder, {})["writes"] = reads
        for fused, order in orders.items():
            fused.load(**order)
        return list(orders)


class _Folded:
    """See `MaskedNetwork.masked`."""

    def __init__(self, network: MaskedNetwork, folded: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self._network, self._folded = network, folded
        self._changed: list[FusedConv] = []

    def __enter__(self) -> Callable[[Frontier], Tensor]:
        with torch.no_grad():
            self._changed = self._network._install(self._folded)
        return self._run

    def __exit__(self, *_error: object) -> None:
        network = self._network
        for fused in self._changed:
            fused.reset()
        with torch.no_grad():
            for name in self._folded.keys() - network._halves.fused.keys():
                _weight(network._halves.masked, name).copy_(network._weights[name])

    @torch.inference_mode()
    def _run(self, frontier: Frontier) -> Tensor:
        return self._network._run(*frontier)


def _some(read: Tensor) -> Tensor:
    """Indices of the channels that are read; where none is, the first one (its weights are zero)."""
    indices = read.nonzero().flatten()
    return indices if len(indices) else indices.new_zeros(1)


def _weight(masked: nn.Module, name: str) -> Tensor:
    weight = masked.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
