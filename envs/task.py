"""A pruning task: one network, the images it is evaluated on, and what keep masks of its filter groups are worth.

Shapes: M masks, N filters, B images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..rewards.outcome import Outcome
from .data.objective import Objective
from .data.splits import Splits
from .evaluation.dense_baseline import DenseBaseline, measure_baseline
from .evaluation.evaluation_settings import EvaluationSettings
from .evaluation.mask_evaluator import MaskEvaluator, correct_flags
from .groups.finding import find_groups
from .networks.cost import Cost, count_cost
from .networks.memory_layout import suited
from .observation import STATISTIC_NAMES, Observation, observe
from .repair.compensation import Compensation
from .surgery.cutting import checked_keep, checked_masks, prune
from .surgery.filter_group import FilterGroup, GroupPlan, select_groups
from .surgery.group_cost import pruned_cost
from .surgery.group_matching import dense_rows, left_of, named_as, restricted
from .surgery.kept_channels import KeptChannels
from .surgery.limits import Limits
from .surgery.masking import MixKey
from .surgery.meters import Clock, Meter
from .surgery.targets import Constraints, Target, constraints_of


class DecisionTask(Protocol):
    """One decision: what is seen of N filters, what a keep mask of them is worth, and the network it leads to.

    What environments, and searches in them, know of a task: `LayerTask` decides on one filter group, `OneShotTask` on
    all groups of a network together.
    """

    @property
    def name(self) -> str:
        """What the decision is about, for logs and infos."""

    @property
    def n_filters(self) -> int:
        """N."""

    @property
    def n_images(self) -> int:
        """Images of the reward split."""

    @property
    def observation(self) -> Observation:
        """What is seen of the filters before the decision."""

    def outcomes(self, masks_MN: Tensor, image_indices: Tensor | None = None) -> list[Outcome]:
        """What each mask does to the network, on the whole reward split or on the images named, (B,) int64.

        A mask that keeps everything is the network itself, bit for bit. ValueError for masks of another shape and for
        one that keeps nothing of a filter group.
        """

    def cut(self, keep: Tensor) -> nn.Module:
        """A new, smaller network without the filters that `keep` (N,) bool drops."""


class PruningTask:
    """A network in some state of pruning, evaluated against the network it came from.

    Args:
        model: the network now (never changed here).
        splits: fit, reward and report images; the report split is never touched by this class.
        base: what the dense network did (`measure_baseline`); measured here when None.
        settings: how masks are evaluated.
        layers: names or globs of the groups that may be pruned; None means every prunable one.
        seed: chooses the images of the fit split behind statistics and compensation.
        device: where images are evaluated.
        limits: what every decision must respect (widths, protected filters), in the dense network's numbers and names.
        origin: the task of the dense network, if `model` was pruned already; `replace_model` sets it.
        kept: which of the dense network's channels are left; None if that is not known.
        trained: the task of the network as it was trained last, which compensation aims at; None: the dense one.
        clock: what a network takes on the device at hand, for targets and rewards of time; None: not known.
    """

    def __init__(
        self,
        model: nn.Module,
        splits: Splits,
        *,
        base: DenseBaseline | None = None,
        settings: EvaluationSettings | None = None,
        layers: Sequence[str] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        limits: Limits | None = None,
        origin: PruningTask | None = None,
        kept: KeptChannels | None = None,
        trained: PruningTask | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.model = model
        self.splits = splits
        self.settings = settings or EvaluationSettings()
        self.layers = layers
        self.seed = seed
        self.device = torch.device(device)
        self.base = base or measure_baseline(model, splits, device)
        self.origin = origin or self
        self.trained = trained or self.origin
        self.kept = KeptChannels() if origin is None else kept
        self._limits = limits or Limits()
        self.clock = clock

    @cached_property
    def plan(self) -> GroupPlan:
        """Every filter group under its name in the dense network, and every skipped one with its reason.

        Those of a network that was cut are followed from the dense one's where that is sure (`left_of`); every cut is
        measured against its mask anyway.
        """
        if self.origin is not self and self.kept is not None:
            followed = left_of(self.origin.plan, self.origin.model, self.kept)
            if followed is not None:
                return followed
        found = find_groups(self.model, self.example, whole_blocks=self.origin._limits.whole_blocks)
        return found if self.origin is self or self.kept is None else named_as(found, self.origin.plan, self.kept)

    @cached_property
    def limits(self) -> Limits:
        """What every decision must respect, by group name."""
        return self._limits.resolved(self.plan) if self.origin is self else self.origin.limits

    def dense_twin(self, group: FilterGroup) -> FilterGroup | None:
        """The dense network's group that `group` is what is left of; None before any cut, or where that is unknown."""
        return self._twin(group, self.origin)

    def compensation_target(self, group: FilterGroup) -> tuple[nn.Module, FilterGroup] | None:
        """The network whose channels compensation aims at, and what `group` is there; None: this network itself."""
        if self.settings.target == "current":
            return None
        source = self.origin if self.settings.target == "dense" else self.trained
        twin = self._twin(group, source)
        return None if twin is None else (source.model, twin)

    def _twin(self, group: FilterGroup, before: PruningTask) -> FilterGroup | None:
        """The group of an earlier state of the network that `group` is left of; None for this state."""
        if before is self or self.kept is None or before.kept is None:
            return None
        found = dense_rows(group, self.origin.plan, self.kept)
        if found is None or before is self.origin:
            return None if found is None else restricted(*found)
        named = [each for each in before.plan.groups if each.name == found[0].name]
        there = dense_rows(named[0], self.origin.plan, before.kept) if named else None
        if there is None:
            return None
        place = {int(row): position for position, row in enumerate(there[1])}
        return restricted(named[0], np.array([place[int(row)] for row in found[1]], dtype=np.int64))

    def limits_of(self, group: FilterGroup) -> Limits:
        """The limits of one group, its protected filters numbered as they are now."""
        found = None if self.kept is None else dense_rows(group, self.origin.plan, self.kept)
        return self.limits if found is None else self.limits.renumbered(group.name, found[1])

    @property
    def objective(self) -> Objective:
        """The metric, and the loss that goes with it."""
        return self.splits.objective

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
        """The whole reward split: images (B, C, H, W) and labels (B,), or other targets (B, ...)."""
        if self.origin is not self:
            return self.origin.reward_images  # on the device once, however many layers are cut
        images, labels = self.splits.reward.batch(torch.arange(len(self.splits.reward)))
        return suited(self.model, images.to(self.device)), labels.to(self.device)

    @cached_property
    def cost(self) -> Cost:
        """MACs and parameters of the network as it is now."""
        return count_cost(self.model, self.example)

    @cached_property
    def seconds(self) -> Meter | None:
        """What the dense network takes, by filters kept per group of its plan; None without a clock."""
        if self.origin is not self:
            return self.origin.seconds
        return None if self.clock is None else self.clock(self.model, self.plan.groups)

    def constraints(self, target: Target) -> Constraints:
        """What a target means for the network as it is now; UserError for one of time without a clock."""
        return constraints_of(target, self.model, self.cost, self.groups, self.clock)

    def reached(self, target: Target, masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """For every resource of a target its cost in this network and under masks (N,) by group name; JSON-able."""
        rows = self.constraints(target).reached([int(masks[group.name].sum()) for group in self.groups])
        holds_for = getattr(self.clock, "conditions", None)
        return [row | ({"conditions": holds_for} if row["unit"] == "seconds" else {}) for row in rows]

    @cached_property
    def correct(self) -> Tensor:
        """What the network as it is now gets right on the reward split, image by image, or its points: (B,)."""
        if self.origin is self:
            return self.base.correct  # measured already
        return correct_flags(self.model, *self.reward_images, objective=self.objective)

    @property
    def accuracy(self) -> float:
        """Accuracy of the network as it is now on the whole reward split."""
        return self.objective.fraction(self.correct)

    def fit_images(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` images of the fit split, always the same ones for one seed."""
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(self.splits.fit), generator=generator)[:count]
        images, labels = self.splits.fit.batch(chosen)
        return suited(self.model, images.to(self.device)), labels.to(self.device)

    def layer(self, name: str) -> LayerTask:
        """The task of one filter group, by its exact name; UserError for any other."""
        for group in self.plan.groups:
            if group.name == name:
                return LayerTask(self, group)
        matched = ", ".join(group.name for group in select_groups(self.plan, [name]))
        raise UserError(f"One layer is decided at a time, but {name!r} matches {matched}; name one of them.")

    def outcome(self, base_accuracy: float, accuracy: float, n_kept: Mapping[FilterGroup, int]) -> Outcome:
        """What a cut to these counts costs, beside accuracies (fractions) measured elsewhere."""
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
            base_seconds=None if self.seconds is None or self.kept is None else self.seconds.whole,
            pruned_seconds=self._seconds_at(n_kept),
        )

    def _seconds_at(self, n_kept: Mapping[FilterGroup, int]) -> float | None:
        """Time of the network cut to these counts; None without a clock, or where what is left of it is not known."""
        if self.seconds is None or self.kept is None:
            return None
        named = {group.name: count for group, count in n_kept.items()}
        left = [named.get(group.name, self.kept.n_kept(group)) for group in self.seconds.groups]
        return self.seconds.cost(left)

    def with_settings(self, settings: EvaluationSettings, seed: int | None = None) -> PruningTask:
        """The same network, evaluated under other settings, or with other images behind statistics and compensation.

        Shared, as neither has a part in them: the baseline, groups, limits, MACs and parameters, and the reward images
        on the device. What is seen of layers and fitted to them (observations, evaluators, compensation) is the new
        task's own.
        """
        task = PruningTask(
            self.model,
            self.splits,
            base=self.base,
            settings=settings,
            layers=self.layers,
            seed=self.seed if seed is None else seed,
            device=self.device,
            origin=None if self.origin is self else self.origin,
            kept=self.kept,
            trained=None if self.trained is self else self.trained,
            clock=self.clock,
        )
        task.trained = task if self.trained is self else task.trained
        task.plan, task.groups, task.limits = self.plan, self.groups, self.limits
        task.cost, task.reward_images = self.cost, self.reward_images
        return task


def replace_model(
    task: PruningTask, model: nn.Module, kept: KeptChannels | None = None, *, trained: bool = False
) -> PruningTask:
    """The same task on another state of the network (after surgery or fine-tuning).

    `kept` says which of the dense network's channels `model` has (`KeptChannels.after`); it can be left out for other
    weights in the same shapes. After a cut without it, groups have the names of the smaller network, and compensation
    cannot aim at the dense one. With `trained` it aims at `model` from now on (`EvaluationSettings.target`).
    """
    if kept is None and _shapes(model) == _shapes(task.model):
        kept = task.kept
    replaced = PruningTask(
        model,
        task.splits,
        base=task.base,
        settings=task.settings,
        layers=task.layers,
        seed=task.seed,
        device=task.device,
        origin=task.origin,
        kept=kept,
        trained=task.trained,
        clock=task.clock,
    )
    replaced.trained = replaced if trained else replaced.trained
    return replaced


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


class LayerTask:
    """One filter group as a decision, evaluated under masks; the network is cut only when the decision is made."""

    def __init__(self, task: PruningTask, group: FilterGroup) -> None:
        self.task = task
        self.group = group

    @property
    def name(self) -> str:
        """The group's."""
        return self.group.name

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
        return observe(self.task.model, self.group, images, labels, objective=self.task.objective)

    @cached_property
    def evaluator(self) -> MaskEvaluator:
        """Counts correct answers in full precision."""
        return self._evaluator("float32")

    @cached_property
    def search_evaluator(self) -> MaskEvaluator:
        """Counts correct answers during a search, in the precision of `settings.dtype`."""
        dtype = self.task.settings.dtype
        return self.evaluator if dtype == "float32" else self._evaluator(dtype)

    def _evaluator(self, dtype: str) -> MaskEvaluator:
        task, settings = self.task, self.task.settings
        return MaskEvaluator(
            task.model,
            [self.group],
            *task.reward_images,
            dtype=dtype,
            objective=task.objective,
            cache_gib=settings.cache_gib,
            method=settings.method,
            compile=settings.compile,
            memory=settings.memory,
        )

    @cached_property
    def compensation(self) -> Compensation | None:
        """Stands in for dropped channels, or None when switched off."""
        settings = self.task.settings
        if not settings.compensate:
            return None
        images, _ = self.task.fit_images(settings.compensation_images)
        dense, twin = self.task.compensation_target(self.group) or (None, None)
        return Compensation.fit(
            self.task.model, self.group, images, dense=dense, dense_group=twin, ridge=settings.ridge
        )

    @property
    def is_fixed(self) -> bool:
        """Whether the task's limits leave nothing to decide here."""
        return self._limits.is_fixed(self.task.model, self.group)

    @cached_property
    def _limits(self) -> Limits:
        return self.task.limits_of(self.group)

    def allowed(self, masks_MN: Tensor) -> Tensor:
        """The masks (M, N) bool that the task's limits make of these; `outcomes` and `cut` see them like this."""
        if self._limits.none:
            return masks_MN
        importance = torch.from_numpy(self.observation.statistics[:, STATISTIC_NAMES.index("taylor")])
        return self._limits.apply(self.task.model, self.group, masks_MN, importance)

    def mixes(self, masks_MN: Tensor) -> dict[MixKey, Tensor]:
        """The compensation's channel mixes (M, N, N) under masks, by group and consumer; empty without one."""
        return {} if self.compensation is None else self.compensation.matrices(masks_MN)

    def outcomes(self, masks_MN: Tensor, image_indices: Tensor | None = None) -> list[Outcome]:
        """What each mask does to the network: on the whole reward split exactly, on the images named as in a search.

        `image_indices` (B,) int64 names the images for the baseline as well. ValueError for masks of another shape and
        for one that keeps nothing.
        """
        masks_MN = self.allowed(checked_masks(self.group, masks_MN))
        points = self._points(masks_MN, image_indices)
        base, objective = self.task.base.correct, self.task.objective
        before = objective.fraction(base if image_indices is None else base[image_indices])
        return [
            self.task.outcome(before, objective.fraction(own), {self.group: kept})
            for own, kept in zip(points, masks_MN.sum(1).tolist(), strict=True)
        ]

    def _points(self, masks_MN: Tensor, image_indices: Tensor | None) -> Tensor:
        """Right answers, or points, of each image under each mask: (M, B), or (M, B, W) where points are rows."""
        whole = masks_MN.all(1)
        labels = self.task.reward_images[1]
        points = self.task.objective.room(len(masks_MN), labels if image_indices is None else labels[image_indices])
        if bool(whole.any()):
            # The network itself: an evaluator, which folds batch norms and may round to bfloat16, comes close only.
            own = self.task.correct
            points[whole] = own if image_indices is None else own[image_indices.cpu()]
        if not bool(whole.all()):
            evaluator, masks_MN = self.evaluator if image_indices is None else self.search_evaluator, masks_MN[~whole]
            mixes = self.mixes(masks_MN) or None
            masks = {self.group.name: masks_MN}
            points[~whole] = evaluator.correct_per_image(masks, image_indices=image_indices, mixes=mixes)
        return points

    def disagreement_with_float32(self, masks_MN: Tensor) -> dict[str, float]:
        """How a search's precision differs from float32 on the whole reward split, under M masks.

        Returns `answers` (fraction of all answers that are right in one and wrong in the other, or score differently)
        and `accuracy` (the largest difference of a mask's accuracy).
        """
        masks = {self.group.name: self.allowed(masks_MN)}
        mixes = self.mixes(masks[self.group.name])
        exact = self.evaluator.correct_per_image(masks, mixes=mixes)
        quick = self.search_evaluator.correct_per_image(masks, mixes=mixes)
        score = self.task.objective.fraction
        apart = max(abs(score(one) - score(other)) for one, other in zip(exact, quick, strict=True))
        differ = (exact != quick).reshape(*exact.shape[:2], -1).any(2)
        return {"answers": float(differ.double().mean()), "accuracy": apart}

    def cut(self, keep: Tensor) -> nn.Module:
        """A new, smaller network without the filters that `keep` (N,) bool drops; a plain copy where it drops none."""
        keep = self.allowed(checked_keep(self.group, keep)[None])[0]
        model = prune(self.task.model, {self.group: keep})
        if not bool(keep.all()) and self.compensation is not None:
            self.compensation.fold(model, self.group, keep)
        return model
