"""Compensation: dropped channels predicted from the kept ones, folded into the layer that reads them.

A linear regression at the consumer's input: the channel that every filter i would have made is predicted from the
kept channels, x'_i = sum_k P_ik x_k. Design page, fact 11; the idea of reconstructing the next layer's input by least
squares is that of Luo et al. 2017 (ThiNet, arXiv 1707.06342) and He et al. 2017 (arXiv 1707.06168).

Shapes: M masks, N filters, S samples (images x positions x channels of one filter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UserError
from ..networks.batch_size import cached_batch, chunks, gradient_batch
from ..networks.copying import copied
from ..networks.hooks import removed_after
from ..networks.modes import evaluating
from ..surgery.cutting import checked_keep
from ..surgery.filter_group import Cut, FilterGroup
from ..surgery.folding import fold, mixing_obstacle, reading_weight, set_reading_weight
from ..surgery.masking import MixKey, channel_dim
from ..surgery.shared_weights import SHARES, sharing_modules
from ..surgery.slicing import axes_of, slice_module, width


@dataclass(frozen=True)
class Moments:
    """Uncentred second moments at one consumer: `gram` X^T X and `cross` X^T Y, both (N, N) float64.

    X is what the network feeds the consumer, Y what it should (the dense network's channels, or X itself).
    """

    gram: Tensor
    cross: Tensor


@dataclass(frozen=True)
class Compensation:
    """Moments and weights of every consumer of a group that can be compensated; made by `fit`.

    Args:
        group: the filter group.
        ridge: strength of the ridge, relative to the mean energy of a channel.
        moments: consumer -> moments.
        consumers: consumer -> a copy of it, taken with the moments.
        skipped: consumer -> why it is only masked.
    """

    group: FilterGroup
    ridge: float
    moments: Mapping[str, Moments]
    consumers: Mapping[str, nn.Module]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def fit(
        model: nn.Module,
        group: FilterGroup,
        images: Tensor,
        *,
        dense: nn.Module | None = None,
        dense_group: FilterGroup | None = None,
        ridge: float = 1e-3,
        batch: int | None = None,
    ) -> Compensation:
        """Measure what the consumers of `group` read.

        Args:
            model: the network now (earlier groups may have been pruned already); never changed.
            group: the group that is about to be pruned, found in `model`.
            images: (B, ...) images of the fit split.
            dense: the network before any pruning. With it, its channels are the target, so that the drift which
                earlier pruning caused is corrected too, in kept channels as well; without it `model`'s own are.
            dense_group: the same group as found in `dense`; needed where the consumer's channels are numbered
                otherwise there (concatenations with pruned neighbours).
            ridge: > 0; it draws the solution towards plain masking.
            batch: images whose samples are held at once; None: 256, fewer of large images.

        Raises UserError for a ridge that is not positive, or a dense network whose group does not fit.
        """
        if not ridge > 0:
            raise UserError(f"The ridge of a compensation must be greater than 0, got {ridge}.")
        cuts, skipped = _usable(model, group)
        targets = _targets(cuts, model, dense, dense_group or group)
        batch = batch or gradient_batch(images, 256)
        moments = _moments(model, cuts, dense, targets, images, batch) if cuts else {}
        consumers = {cut.module: copied(model.get_submodule(cut.module)) for cut in cuts}
        return Compensation(group, ridge, moments, consumers, skipped)

    def matrices(self, masks_MN: Tensor) -> dict[MixKey, Tensor]:
        """Mixes for masks (M, N) bool: (group, consumer) -> (M, N, N) float64, 0 in the columns of dropped filters."""
        return {(self.group.name, name): solve(each, masks_MN.cpu(), self.ridge) for name, each in self.moments.items()}

    def fold(self, pruned: nn.Module, group: FilterGroup, keep: Tensor) -> None:
        """Fold the compensation of one mask into the consumers of the pruned network, in place.

        Args:
            pruned: `prune(model, {group: keep})`, with the model and group that were given to `fit`.
            group: that group.
            keep: (N,) bool.

        The result equals the masked network under `matrices(keep[None])`, to rounding; where nothing is dropped, not a
        bit changes. Raises UserError if `pruned` lost anything else.
        """
        if group is not self.group:
            raise UserError(f"This compensation was fitted for group {self.group.name!r}, not for this {group.name!r}.")
        keep = checked_keep(group, keep)
        if keep.all() or not keep.any():
            return  # nothing to make up for, or nothing that could
        mixes = self.matrices(keep[None])
        for cut in (cut for cut in group.consumers if cut.module in self.moments):
            module = copied(self.consumers[cut.module])
            mix = mixes[group.name, cut.module][0]
            set_reading_weight(module, fold(module, reading_weight(module).detach(), cut, mix))
            _cut_like(group, cut.module, module, keep)
            place, weight = reading_weight(pruned.get_submodule(cut.module)), reading_weight(module)
            if place.shape != weight.shape:
                raise UserError(
                    f"The pruned network has weights {tuple(place.shape)} at {cut.module!r}, expected "
                    f"{tuple(weight.shape)}: fold right after pruning group {group.name!r} alone."
                )
            set_reading_weight(pruned.get_submodule(cut.module), weight.detach())

    def folded(self, model: nn.Module, keep: Tensor) -> nn.Module:
        """A copy of the network that `fit` saw, compensated but not yet pruned: dropped channels have zero weights."""
        result = copied(model)
        keep = checked_keep(self.group, keep)
        if keep.all():
            return result
        mixes = self.matrices(keep[None])
        for cut in self.group.consumers:
            if cut.module in self.moments:
                module = result.get_submodule(cut.module)
                mix = mixes[self.group.name, cut.module][0]
                set_reading_weight(module, fold(module, reading_weight(module).detach(), cut, mix))
        return result


def solve(moments: Moments, masks_MN: Tensor, ridge: float) -> Tensor:
    """Channel mixes (M, N, N) float64 by ridge regression towards plain masking.

    With E = diag(mask): P = E + (C - G E)^T G_kept^-1, where G_kept is the Gram matrix of the kept channels plus
    ridge x mean energy. If the target is the network itself (C = G), kept channels stay exactly what they are. A mask
    that drops nothing gives the identity under any target: a layer that is kept as it is keeps its weights.
    """
    gram, cross = moments.gram, moments.cross
    keep = masks_MN.to(gram.dtype)
    strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
    both = keep[:, :, None] * keep[:, None, :]
    # Dropped channels get a unit row: the system stays regular, and they take no part.
    system = gram * both + torch.diag_embed(keep * strength + (1 - keep))
    rest = (cross - gram * keep[:, None, :]) * keep[:, :, None]
    mixes = torch.diag_embed(keep) + torch.linalg.solve(system, rest).transpose(1, 2)
    mixes[masks_MN.all(1)] = torch.eye(len(gram), dtype=gram.dtype)
    return mixes


def _usable(model: nn.Module, group: FilterGroup) -> tuple[list[Cut], dict[str, str]]:
    found = {cut.module: mixing_obstacle(model.get_submodule(cut.module), cut) for cut in group.consumers}
    found |= {name: f"{name!r} {SHARES}" for name in found.keys() & sharing_modules(model)}
    skipped = {name: reason for name, reason in found.items() if reason}
    return [cut for cut in group.consumers if cut.module not in skipped], skipped


def _targets(cuts: list[Cut], model: nn.Module, dense: nn.Module | None, dense_group: FilterGroup) -> dict[str, Cut]:
    """The cuts at which the dense network shows the wanted channels."""
    if dense is None:
        return {}
    by_name = {cut.module: cut for cut in dense_group.consumers}
    for cut in cuts:
        target = by_name.get(cut.module)
        if target is None or target.channels.shape != cut.channels.shape:
            raise UserError(
                f"The dense network's group {dense_group.name!r} does not match at {cut.module!r}: it must have the "
                f"{len(cut.channels)} filters of the group that is to be pruned."
            )
    return {cut.module: by_name[cut.module] for cut in cuts}


def _moments(
    model: nn.Module,
    cuts: list[Cut],
    dense: nn.Module | None,
    targets: Mapping[str, Cut],
    images: Tensor,
    batch: int,
) -> dict[str, Moments]:
    sums = {
        cut.module: [torch.zeros(len(cut.channels), len(cut.channels), dtype=torch.float64) for _ in "gc"]
        for cut in cuts
    }
    with torch.no_grad():
        for start in range(0, len(images), batch):
            now = _inputs(model, cuts, images[start : start + batch])
            goal = now if dense is None else _inputs(dense, list(targets.values()), images[start : start + batch])
            for name, seen in now.items():
                for x, y in zip(seen, goal[name], strict=True):
                    sums[name][0] += (x.T @ x).cpu().double()
                    sums[name][1] += (x.T @ y).cpu().double()
    return {name: Moments(both[0], both[1]) for name, both in sums.items()}


def _inputs(model: nn.Module, cuts: list[Cut], images: Tensor) -> dict[str, list[Tensor]]:
    """What the consumers read of the group: (S, N) for every call."""
    parts = [_seen(model, cuts, images[rows]) for rows in chunks(len(images), cached_batch(images))]
    if any(len(part[name]) != len(calls) for part in parts for name, calls in parts[0].items()):
        return _seen(model, cuts, images)  # it calls its layers as images tell it to
    return {name: [torch.cat(each) for each in zip(*(part[name] for part in parts), strict=True)] for name in parts[0]}


def _seen(model: nn.Module, cuts: list[Cut], images: Tensor) -> dict[str, list[Tensor]]:
    """`_inputs`, of images that go through the network together."""
    seen: dict[str, list[Tensor]] = {cut.module: [] for cut in cuts}

    def reader(cut: Cut) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            value = inputs[0].movedim(channel_dim(module, inputs[0]), -1)
            rows = torch.as_tensor(cut.channels, device=value.device)
            # (..., N, R): every channel of a filter is one more sample of it.
            seen[cut.module].append(value[..., rows].transpose(-1, -2).reshape(-1, len(rows)))

        return hook

    hooks = (model.get_submodule(cut.module).register_forward_pre_hook(reader(cut)) for cut in cuts)
    with removed_after(hooks), evaluating(model):
        model(images)
    return seen


def _cut_like(group: FilterGroup, name: str, module: nn.Module, keep: Tensor) -> None:
    """Cut one module of the group, in place, as the surgery cuts it."""
    rows = {axis: np.arange(width(module, axis), dtype=np.int64) for axis in axes_of(module)}
    for cut in group.cuts:
        if cut.module == name and cut.axis in rows:
            rows[cut.axis] = np.setdiff1d(rows[cut.axis], cut.channels[~keep.numpy()])
    slice_module(name, module, rows.get("out"), rows.get("in"))
