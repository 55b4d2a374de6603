"""A masked network: what does not depend on any mask is computed once, only the rest runs per mask.

Masks are folded into the weights of the consumers (`folding`), so a mask costs one pass through the suffix and no copy
of any activation; channels that a mask leaves unread are neither read nor computed where that is possible. Networks
that `torch.fx` cannot trace run whole, with the same folding and the same results.

Shapes: M masks, N filters, B images, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...errors import UserError
from ..networks.answers import adapter_of
from ..networks.memory_layout import arranged, layout_of
from ..surgery.filter_group import Branch, FilterGroup, masked_modules, vanished
from ..surgery.folding import (
    by_input,
    fold,
    fold_all,
    from_input,
    mixing_obstacle,
    reading_weight,
    set_reading_weight,
)
from ..surgery.masking import MixKey
from .cudnn_conv import fuse_relu
from .fused_conv import FusedConv, can_fuse, has_bfloat16
from .graph_partition import Frontier, GraphPartition, partition, unpartitioned
from .stacked_suffix import stacked_suffix

METHODS = ("auto", "split", "whole")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EMULATED = (
    "This processor does not compute in bfloat16, or torch cannot use it (on x86 oneDNN asks for AVX-512, "
    "AVX-NE-CONVERT or AMX): evaluation.dtype=bfloat16 runs without the fused convolutions, probably slower than "
    "float32; leave evaluation.dtype at float32."
)


class MaskedNetwork:
    """Runs a network under keep masks of some of its groups.

    Args:
        model: the network; it is copied, never changed. It takes one tensor and returns logits (B, C).
        groups: the groups whose masks will vary.
        example: (B, ...) a few images; used to find out which values are per image and to check the partition.
        method: "split" (traced, with a frontier), "whole" (every mask runs everything), or "auto": split if possible.
        dtype: "float32" or "bfloat16": the precision everything is computed in.
        compile: run the suffix through `torch.compile`, in place of the fused convolutions.
        stack: run many masks in one batch where the network allows it (`stacked_suffix`); None does so on a GPU.

    `method` says which one is used, `why_whole` the reason if it is not "split", `stacks` whether masks run in one
    batch. Warns where bfloat16 is asked for on a processor that has to emulate it.
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
        adapter = adapter_of(model)
        if dtype == "bfloat16" and adapter is not None and adapter.packing is not None and adapter.packing.has_integers:
            raise UserError("evaluation.dtype=bfloat16 would round the inputs of whole numbers; use float32.")
        if dtype == "bfloat16" and example.device.type == "cpu" and not has_bfloat16():
            warn_of_emulation()
        self.why_whole = "it was asked for" if method == "whole" else ""
        self.groups, self.dtype, self.compile = tuple(groups), DTYPES[dtype], compile
        self.layout = layout_of(model, example)
        example = arranged(example, self.layout)
        stack = example.device.type != "cpu" if stack is None else stack
        fusing = not compile and not stack and can_fuse(example, self.dtype)
        found = None if method == "whole" else self._partitioned(model, example, method, fusing)
        self.method = "whole" if found is None else "split"
        self._partition = found or unpartitioned(model, example)
        names = masked_modules(groups)
        masked = self._partition.masked
        self._weights = {name: reading_weight(masked.get_submodule(name)).detach().clone() for name in names}
        self._run = torch.compile(self._partition.suffix, dynamic=False) if compile else self._partition.suffix
        if self.dtype != torch.float32:
            self._cast(example)
        self._set_up_stack(example, stack)

    def _partitioned(self, model: nn.Module, example: Tensor, method: str, fusing: bool) -> GraphPartition | None:
        try:
            return partition(model, self.groups, example, fusing=fusing)
        except Exception as error:
            if method == "split":
                raise UserError(f'The network cannot be split ({error}); use method "whole" or "auto".') from error
            self.why_whole = f"the network cannot be split ({error})"
            return None

    def _set_up_stack(self, example: Tensor, stack: bool) -> None:
        """All masks in one batch, if wanted and possible; on an NVIDIA GPU everything in as few kernels as possible."""
        self._stacked = None
        if stack and isinstance(self._partition.suffix, fx.GraphModule):
            self._stacked = stacked_suffix(self._partition.suffix, self.prefix(example), self._weights, self.layout)
        if self.compile:
            if self._stacked is not None:
                self._stacked.run = torch.compile(self._stacked.graph, dynamic=False)
        elif example.is_cuda:
            stacked = None if self._stacked is None else self._stacked.graph
            for graph in (self._partition.prefix, self._partition.suffix, stacked):
                if isinstance(graph, fx.GraphModule):
                    fuse_relu(graph)

    def _cast(self, example: Tensor) -> None:
        found = self._partition
        try:
            for part in (found.prefix, found.suffix, found.masked):
                if isinstance(part, nn.Module):
                    part.to(self.dtype)
            for fused in found.fused.values():
                fused.cast(self.dtype)
            with torch.inference_mode():
                found.suffix(*self.prefix(example))
        except (RuntimeError, TypeError) as error:
            raise UserError(f"The network cannot be evaluated in {self.dtype} ({error}); use float32.") from error

    @torch.inference_mode()
    def prefix(self, images: Tensor) -> Frontier:
        """The frontier of the images (B, ...): every value that no mask changes and the suffix reads, B rows each."""
        return self._partition.prefix(images.to(self.dtype))

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
        """Runs the suffix under all M masks in one batch: logits (M, B, C) of a frontier; arguments as for `masked`."""
        stacked, n_masks = self._stacked, len(next(iter(masks.values())))
        if stacked is None:
            raise ValueError("this network's masks run one by one; see `stacks`.")
        weights = {name: weight.expand(n_masks, *weight.shape).clone() for name, weight in self._weights.items()}
        gone = self._gone(masks)
        for group in self.groups:
            for cut in group.consumers if group.name in masks else ():
                choices = (mixes or {}).get((group.name, cut.module), masks[group.name])
                if group.branch is None or group.branch not in gone:
                    fold_all(weights[cut.module], cut, choices)
                    continue
                rows = ~gone[group.branch]  # elsewhere the branch's last layer sees none of these filters
                weights[cut.module][rows] = fold_all(weights[cut.module][rows], cut, choices[rows])
        for branch, rows in gone.items():
            weights[branch.chain[0]][rows] = 0
        return torch.inference_mode()(lambda frontier: stacked(frontier, weights))

    def _gone(self, masks: Mapping[str, Tensor]) -> dict[Branch, Tensor]:
        """Under which of the M masks each branch has vanished, (M,) bool; those that never do are left out."""
        gone: dict[Branch, Tensor] = {}
        for group in self.groups:
            if group.branch is not None and group.name in masks and not bool((kept := masks[group.name].any(1)).all()):
                gone[group.branch] = gone[group.branch] | ~kept if group.branch in gone else ~kept
        return gone

    def _folded(
        self, masks: Mapping[str, Tensor], index: int, mixes: Mapping[MixKey, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Consumer -> its weights under a mask, and which input channels they still read, (C,) bool.

        What a plain mask drops is not yet zero in the weights: most are never looked at again (`_zeroed`).
        """
        folded: dict[str, tuple[Tensor, Tensor]] = {}
        gone = vanished({group: masks[group.name][index] for group in self.groups if group.name in masks})
        for branch in gone:
            weight, read = self._untouched(branch.chain[0])
            folded[branch.chain[0]] = weight, torch.zeros_like(read)
        for group in self.groups:
            if group.branch is not None and group.branch in gone:
                continue  # what its filters are does not matter: the branch's last layer sees none of it
            for cut in group.consumers if group.name in masks else ():
                mix = mixes.get((group.name, cut.module))
                module = self._partition.masked.get_submodule(cut.module)
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
        module = self._partition.masked.get_submodule(name)
        first = by_input(module, weight).clone(memory_format=torch.preserve_format)
        first[~read.to(weight.device)] = 0
        return from_input(module, first)

    def _untouched(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self._weights[name]
        n_channels = len(by_input(self._partition.masked.get_submodule(name), weight))
        return weight, torch.ones(n_channels, dtype=torch.bool)

    def _install(self, folded: Mapping[str, tuple[Tensor, Tensor]]) -> list[FusedConv]:
        """Put weights where the partition reads them; returns the fused convolutions that were changed."""
        orders: dict[FusedConv, dict[str, Any]] = {}
        for name, (weight, read) in folded.items():
            fused = self._partition.fused.get(name)
            if fused is None or fused.n_groups > 1 or not bool(read.any()):
                weight = self._zeroed(name, weight, read)
            if fused is None:
                set_reading_weight(self._partition.masked.get_submodule(name), weight)
                continue
            reads = None if fused.n_groups > 1 or bool(read.all()) else _some(read)
            feeder = None if reads is None else self._partition.feeders.get(fused)
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
            for name in self._folded.keys() - network._partition.fused.keys():
                set_reading_weight(network._partition.masked.get_submodule(name), network._weights[name])

    @torch.inference_mode()
    def _run(self, frontier: Frontier) -> Tensor:
        return self._network._run(*frontier)


@cache
def warn_of_emulation() -> None:
    """Say once per process, and not again for every layer, that bfloat16 is emulated."""
    warnings.warn(EMULATED, RuntimeWarning, stacklevel=3)


def _some(read: Tensor) -> Tensor:
    """Indices of the channels that are read; where none is, the first one (its weights are zero)."""
    indices = read.nonzero().flatten()
    return indices if len(indices) else indices.new_zeros(1)
