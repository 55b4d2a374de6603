"""A pruning task: one network, the images that judge it, and what every keep mask of its filter groups is worth.

Shapes: M masks, N filters, B images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..rewards.errors import UserError
from ..rewards.outcome import Outcome
from .compensation import Compensation
from .cost import Cost, count_cost
from .coupling import find_groups
from .evaluate import MaskEvaluator, correct_flags
from .group_cost import pruned_cost
from .groups import FilterGroup, GroupPlan, select_groups
from .masking import MixKey
from .observation import Observation, observe
from .splits import Splits
from .surgery import prune


@dataclass(frozen=True)
class JudgeSettings:
    """How masks are judged.

    Args:
        compensate: regress dropped channels on the kept ones and fold the result into the consumers, in the reward as
            well as in the surgery (design page, fact 11).
        ridge: strength of that regression's ridge, relative to the mean channel energy.
        compensation_images: images of the fit split behind the regression.
        statistics_images: images of the fit split behind an observation.
        cache_gib: memory for the cached part of the network that no mask touches, in GiB.
        method: "auto", "split" or "whole" (`MaskedNetwork`).
    """

    compensate: bool = True
    ridge: float = 1e-3
    compensation_images: int = 1000
    statistics_images: int = 512
    cache_gib: float = 1.0
    method: str = "auto"


@dataclass(frozen=True)
class Base:
    """The network before any pruning: measured once, never again.

    `correct` (B,) bool says image by image what it got right on the reward split, so that the base accuracy of any
    subset of these images is exact and free.
    """

    correct: Tensor
    cost: Cost

    @property
    def accuracy(self) -> float:
        """Fraction in [0, 1] on the whole reward split."""
        return int(self.correct.sum()) / len(self.correct)


def measure_base(model: nn.Module, splits: Splits, device: torch.device | str = "cpu") -> Base:
    """Measure the dense network on the reward split; a network that guesses is refused with a `UserError`."""
    images, labels = splits.reward.batch(torch.arange(len(splits.reward)))
    correct = correct_flags(model, images.to(device), labels.to(device)).cpu()
    base = Base(correct, count_cost(model, images[:1].to(device)))
    chance = float(torch.bincount(labels).max()) / len(labels)
    margin = 3 * (chance * (1 - chance) / len(labels)) ** 0.5
    if base.accuracy <= chance + margin:
        raise UserError(
            f"The base network's accuracy on the {len(labels)} reward images is {base.accuracy:.4f}, which is chance "
            f"level (the most frequent class gives {chance:.4f}); expected a trained network: check the checkpoint, "
            "the normalisation (mean and std) and the order of the classes."
        )
    return base


class PruningTask:
    """A network in some state of pruning, judged against the network it came from.

    Args:
        model: the network now (never changed here).
        splits: fit, reward and report images; the report split is never touched by this class.
        base: what the dense network did (`measure_base`); measured here when None.
        settings: how masks are judged.
        layers: names or globs of the groups that may be pruned; None means every prunable one.
        seed: chooses the images of the fit split behind statistics and compensation.
        device: where images are evaluated.
    """

    def __init__(
        self,
        model: nn.Module,
        splits: Splits,
        *,
        base: Base | None = None,
        settings: JudgeSettings | None = None,
        layers: Sequence[str] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model
        self.splits = splits
        self.settings = settings or JudgeSettings()
        self.layers = layers
        self.seed = seed
        self.device = torch.device(device)
        self.base = base or measure_base(model, splits, device)

    @cached_property
    def plan(self) -> GroupPlan:
        """Every filter group, and every skipped one with its reason."""
        return find_groups(self.model, self.example)

    @cached_property
    def groups(self) -> tuple[FilterGroup, ...]:
        """The groups that may be pruned, in execution order."""
        return select_groups(self.plan, self.layers)

    @property
    def example(self) -> Tensor:
        """One reward image, (1, C, H, W)."""
        return self.reward_images[0][:1]

    @cached_property
    def reward_images(self) -> tuple[Tensor, Tensor]:
        """The whole reward split: images (B, C, H, W) and labels (B,)."""
        images, labels = self.splits.reward.batch(torch.arange(len(self.splits.reward)))
        return images.to(self.device), labels.to(self.device)

    @cached_property
    def cost(self) -> Cost:
        """MACs and parameters of the network as it is now."""
        return count_cost(self.model, self.example)

    @cached_property
    def accuracy(self) -> float:
        """Accuracy of the network as it is now on the whole reward split."""
        return int(correct_flags(self.model, *self.reward_images).sum()) / len(self.splits.reward)

    def fit_images(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` images of the fit split, always the same ones for one seed."""
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(self.splits.fit), generator=generator)[:count]
        images, labels = self.splits.fit.batch(chosen)
        return images.to(self.device), labels.to(self.device)

    def layer(self, name: str) -> LayerTask:
        """The task of one filter group, by its exact name; UserError for any other."""
        for group in self.plan.groups:
            if group.name == name:
                return LayerTask(self, group)
        matched = ", ".join(group.name for group in select_groups(self.plan, [name]))
        raise UserError(f"One layer is decided at a time, but {name!r} matches {matched}; name one of them.")

    def evaluator(self, groups: Sequence[FilterGroup]) -> MaskEvaluator:
        """Counts the right answers under masks of `groups` on the reward split."""
        images, labels = self.reward_images
        cache_gib, method = self.settings.cache_gib, self.settings.method
        return MaskEvaluator(self.model, groups, images, labels, cache_gib=cache_gib, method=method)

    def outcomes(
        self,
        evaluator: MaskEvaluator,
        masks: Mapping[FilterGroup, Tensor],
        mixes: Mapping[MixKey, Tensor],
        image_indices: Tensor | None = None,
    ) -> list[Outcome]:
        """What M masks (M, N) of every group do together, each with its channel mixes (M, N, N).

        `image_indices` (B,) int64 names the reward images to look at, for the base as well; None means all.
        """
        by_name = {group.name: _checked_masks(group, each) for group, each in masks.items()}
        correct = evaluator.correct(by_name, image_indices=image_indices, mixes=mixes or None)
        base = self.base.correct if image_indices is None else self.base.correct[image_indices]
        n_kept = {group: by_name[group.name].sum(1).tolist() for group in masks}
        return [
            self._outcome(
                int(base.sum()) / len(base), int(count) / len(base), {group: kept[i] for group, kept in n_kept.items()}
            )
            for i, count in enumerate(correct)
        ]

    def _outcome(self, base_accuracy: float, accuracy: float, n_kept: Mapping[FilterGroup, int]) -> Outcome:
        macs, params = pruned_cost(self.model, self.cost, n_kept)
        return Outcome(
            base_accuracy=base_accuracy,
            pruned_accuracy=accuracy,
            n_filters=sum(group.n_filters for group in n_kept),
            n_kept=sum(n_kept.values()),
            base_macs=self.base.cost.macs,
            pruned_macs=macs,
            base_params=self.base.cost.params,
            pruned_params=params,
        )


def _checked_masks(group: FilterGroup, masks: Tensor) -> Tensor:
    masks_MN = torch.as_tensor(masks, dtype=torch.bool)
    if masks_MN.dim() != 2 or masks_MN.shape[1] != group.n_filters:
        raise ValueError(
            f"masks of {group.name!r} have shape {tuple(masks_MN.shape)}, expected (M, {group.n_filters})."
        )
    if not bool(masks_MN.any(1).all()):
        raise ValueError(f"a mask of {group.name!r} keeps no filter at all; keep at least one.")
    return masks_MN


def replace_model(task: PruningTask, model: nn.Module) -> PruningTask:
    """The same task on another state of the network (after surgery or fine-tuning)."""
    return PruningTask(
        model,
        task.splits,
        base=task.base,
        settings=task.settings,
        layers=task.layers,
        seed=task.seed,
        device=task.device,
    )


class LayerTask:
    """One filter group of a task: what is seen of it, what a mask is worth, and how it is cut."""

    def __init__(self, task: PruningTask, group: FilterGroup) -> None:
        self.task = task
        self.group = group

    @property
    def n_filters(self) -> int:
        """N."""
        return self.group.n_filters

    @property
    def n_images(self) -> int:
        """Images of the reward split."""
        return len(self.task.splits.reward)

    @cached_property
    def observation(self) -> Observation:
        """Weights (N, D) and statistics (N, F)."""
        images, labels = self.task.fit_images(self.task.settings.statistics_images)
        return observe(self.task.model, self.group, images, labels)

    @cached_property
    def _evaluator(self) -> MaskEvaluator:
        return self.task.evaluator([self.group])

    @cached_property
    def compensation(self) -> Compensation | None:
        """Stands in for dropped channels, or None when switched off."""
        settings = self.task.settings
        if not settings.compensate:
            return None
        images, _ = self.task.fit_images(settings.compensation_images)
        return Compensation.fit(self.task.model, self.group, images, ridge=settings.ridge)

    def mixes(self, masks_MN: Tensor) -> dict[MixKey, Tensor]:
        """The compensation's channel mixes (M, N, N) under masks, by group and consumer; empty without one."""
        return {} if self.compensation is None else self.compensation.matrices(masks_MN)

    def outcomes(self, masks_MN: Tensor, image_indices: Tensor | None = None) -> list[Outcome]:
        """What each mask does to the network, on the whole reward split or on the images named.

        A mask that keeps nothing is refused with a ValueError.
        """
        masks_MN = _checked_masks(self.group, masks_MN)
        return self.task.outcomes(self._evaluator, {self.group: masks_MN}, self.mixes(masks_MN), image_indices)

    def cut(self, keep: Tensor) -> nn.Module:
        """A new, smaller network without the filters that `keep` (N,) bool drops."""
        model = prune(self.task.model, {self.group: keep})
        if self.compensation is not None:
            self.compensation.fold(model, self.group, keep)
        return model
