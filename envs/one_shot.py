"""All filter groups of a network decided in one step: one keep/drop bit per filter of the network.

Shapes: M masks, N filters of all groups together, D weights per filter (of the widest group), F statistics per filter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ..rewards.outcome import Outcome
from .evaluation.mask_evaluator import correct_flags
from .networks.memory_layout import layout_of, order_weights
from .observation import Observation, observe_all
from .repair.judging import Judge
from .repair.reconstruction import Reconstruction, ReconstructionSettings
from .surgery.cutting import checked_masks, prune
from .surgery.filter_group import FilterGroup, coupled
from .task import LayerTask, PruningTask

GROUP_NAME = "network"


@dataclass(frozen=True)
class OneShotObservation(Observation):
    """Weights (N, D), padded with zeros, statistics (N, F), and which group a filter belongs to, (N,) float32."""

    groups: np.ndarray

    def as_dict(self) -> dict[str, np.ndarray]:
        """The Gymnasium form."""
        return {**super().as_dict(), "groups": self.groups}


class OneShotTask:
    """All groups of a task as one decision (`DecisionTask`).

    A mask is evaluated by what it leads to: the network is cut for real, repaired in closed form (`Reconstruction`) if
    asked to, and its correct answers are counted. Observations are of the network before the cut.

    Args:
        task: the network, its images and its groups.
        repair: how cut networks are repaired; None leaves them as cut.
        layers: the groups one by one, with what was seen of them, if that is known already.
    """

    def __init__(
        self, task: PruningTask, repair: ReconstructionSettings | None, layers: Sequence[LayerTask] | None = None
    ) -> None:
        self.task = task
        self.groups = task.groups
        self.repair = repair
        self.layers = layers or [LayerTask(task, group) for group in self.groups]

    @property
    def name(self) -> str:
        """ "network"."""
        return GROUP_NAME

    @property
    def n_filters(self) -> int:
        """N."""
        return sum(group.n_filters for group in self.groups)

    @property
    def n_images(self) -> int:
        """Images of the reward split."""
        return len(self.task.splits.reward)

    def with_repair(self, repair: ReconstructionSettings | None) -> OneShotTask:
        """The same decision, evaluated under another repair; what was seen of the layers is shared."""
        return self if repair == self.repair else OneShotTask(self.task, repair, self.layers)

    @cached_property
    def observation(self) -> OneShotObservation:
        """What is seen of every filter, group after group."""
        self._see()
        seen = [layer.observation for layer in self.layers]
        widest = max(each.weights.shape[1] for each in seen)
        return OneShotObservation(
            np.concatenate([np.pad(each.weights, ((0, 0), (0, widest - each.weights.shape[1]))) for each in seen]),
            np.concatenate([each.statistics for each in seen]),
            np.repeat(np.arange(len(seen), dtype=np.float32), [len(each.weights) for each in seen]),
        )

    def _see(self) -> None:
        """Observe all layers of which nothing was seen yet, by the same passes over the images."""
        task = self.task
        unseen = [each for each in self.layers if each.task is task and "observation" not in vars(each)]
        if len(unseen) < 2:
            return
        images, labels = task.fit_images(task.settings.statistics_images)
        groups = [layer.group for layer in unseen]
        try:
            found = observe_all(task.model, groups, images, labels, objective=task.objective)
        except RuntimeError:
            return  # a GPU's memory, or a network that writes over what it has read: each one when it is asked for
        for layer, each in zip(unseen, found, strict=True):
            layer.observation = each

    @cached_property
    def reconstruction(self) -> Reconstruction | None:
        """The dense network's part of the repair, measured once."""
        if self.repair is None:
            return None
        images, _ = self.task.fit_images(self.repair.images)
        return Reconstruction(self.task.model, images, self.repair)

    @cached_property
    def judge(self) -> Judge:
        """Counts what cut networks get right without building them, where this network lets it."""
        images, targets = self.task.reward_images
        return Judge(self.task.model, self.groups, images, targets, self.task.objective, self.reconstruction)

    def choices(self, keep: Tensor) -> dict[FilterGroup, Tensor]:
        """Masks (..., N) as masks for each group."""
        return dict(zip(self.groups, keep.split([group.n_filters for group in self.groups], dim=-1), strict=True))

    def named(self, keep: Tensor) -> dict[str, Tensor]:
        """One mask (N,) as a mask by group name, nothing kept of a branch that vanishes; `joined` takes it back."""
        return {group.name: part for group, part in coupled(self.choices(keep)).items()}

    def joined(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Masks by group name as one mask (N,)."""
        return torch.cat(list(coupled({group: masks[group.name] for group in self.groups}).values()))

    def cut(self, keep: Tensor) -> nn.Module:
        """A new, smaller network without the filters that `keep` (N,) bool drops, repaired as `repair` says."""
        choices = coupled(self.choices(keep))
        if bool(keep.all()) or self.reconstruction is None:
            return prune(self.task.model, choices)
        return self.reconstruction.cut(choices)

    def outcomes(self, masks_MN: Tensor, image_indices: Tensor | None = None) -> list[Outcome]:
        """What each mask does, on the whole reward split or on the images named; ValueError for an emptied group."""
        masks_MN = torch.as_tensor(masks_MN, dtype=torch.bool)
        if masks_MN.dim() != 2 or masks_MN.shape[1] != self.n_filters:
            came = tuple(masks_MN.shape)
            raise ValueError(f"masks of the network have shape {came}, expected (M, {self.n_filters}).")
        for group, part in self.choices(masks_MN).items():
            checked_masks(group, part)
        (images, labels), objective = self.task.reward_images, self.task.objective
        base = self.task.base.correct
        if image_indices is not None:
            images, labels, base = images[image_indices], labels[image_indices], base[image_indices]
        judged = self._judged(masks_MN, image_indices)
        outcomes = []
        for keep, found in zip(masks_MN, judged, strict=True):
            if bool(keep.all()):
                points = self.task.correct if image_indices is None else self.task.correct[image_indices]
            elif found is not None:
                points = found
            else:
                model, layout = self.cut(keep), layout_of(self.task.model, images)
                order_weights(model, layout)
                points = correct_flags(model, images, labels, objective=objective, layout=layout)
            counts = {group: int(each.sum()) for group, each in coupled(self.choices(keep)).items()}
            outcomes.append(self.task.outcome(objective.fraction(base), objective.fraction(points), counts))
        return outcomes

    def _judged(self, masks_MN: Tensor, image_indices: Tensor | None) -> list[Tensor | None]:
        """Points under each mask, found without cutting; None where the network has to be cut for real."""
        some = [row for row, keep in enumerate(masks_MN) if not bool(keep.all())]
        found: list[Tensor | None] = [None] * len(masks_MN)
        if some and not self.judge.obstacle:
            choices = [coupled(self.choices(masks_MN[row])) for row in some]
            for row, points in zip(some, self.judge.points(choices, image_indices), strict=True):
                found[row] = points
        return found
