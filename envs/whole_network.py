"""The whole network as one episode: a decision per filter group, judged together at the end.

Shapes: M masks, N filters (of the widest group), D weights a filter (of the widest), F statistics a filter.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..rewards.outcome import Outcome
from .evaluate import MaskEvaluator
from .group_cost import pruned_cost
from .task import LayerTask, PruningTask


class NetworkTask:
    """All groups of a task; observations are those of the network before the episode, padded to one shape."""

    def __init__(self, task: PruningTask) -> None:
        self.task = task
        self.layers: list[LayerTask] = [LayerTask(task, group) for group in task.groups]

    @property
    def n_images(self) -> int:
        """Images of the reward split."""
        return len(self.task.splits.reward)

    @cached_property
    def _observations(self) -> list[dict[str, NDArray[np.float32]]]:
        shown = [layer.observation.as_dict() for layer in self.layers]
        n, d = (max(each["weights"].shape[axis] for each in shown) for axis in (0, 1))
        return [
            {
                "weights": _padded(each["weights"], (n, d)),
                "statistics": _padded(each["statistics"], (n, each["statistics"].shape[1])),
                "valid": _padded(np.ones(len(each["weights"]), np.float32), (n,)),
            }
            for each in shown
        ]

    def observation(self, position: int) -> dict[str, NDArray[np.float32]]:
        """Padded weights (N, D), statistics (N, F) and valid (N,) of the group at `position`."""
        return self._observations[position]

    @cached_property
    def _evaluator(self) -> MaskEvaluator:
        settings = self.task.settings
        return MaskEvaluator(
            self.task.model,
            [layer.group for layer in self.layers],
            *self.task.reward_images,
            cache_gib=settings.cache_gib,
            method=settings.method,
        )

    def outcomes(self, masks: list[Tensor], image_indices: Tensor | None = None) -> list[Outcome]:
        """What M combinations do; `masks[i]` is (M, N_i) bool for the group at position i."""
        by_name = {layer.group.name: mask for layer, mask in zip(self.layers, masks, strict=True)}
        mixes = {}
        for layer, mask in zip(self.layers, masks, strict=True):
            mixes.update(layer.compensation.matrices(mask) if layer.compensation else {})
        correct = self._evaluator.correct(by_name, image_indices=image_indices, mixes=mixes or None)
        flags = self.task.base.correct if image_indices is None else self.task.base.correct[image_indices]
        base_accuracy = int(flags.sum()) / len(flags)
        kept_MG = torch.stack([mask.sum(1) for mask in masks], dim=1)
        return [
            self._outcome(base_accuracy, int(count) / len(flags), kept.tolist())
            for count, kept in zip(correct, kept_MG, strict=True)
        ]

    def _outcome(self, base_accuracy: float, accuracy: float, kept: list[int]) -> Outcome:
        counts = {layer.group: n for layer, n in zip(self.layers, kept, strict=True)}
        macs, params = pruned_cost(self.task.model, self.task.cost, counts)
        return Outcome(
            base_accuracy=base_accuracy,
            pruned_accuracy=accuracy,
            n_filters=sum(layer.n_filters for layer in self.layers),
            n_kept=sum(kept),
            base_macs=self.task.base.cost.macs,
            pruned_macs=macs,
            base_params=self.task.base.cost.params,
            pruned_params=params,
        )


def _padded(array: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.pad(array, [(0, wide - narrow) for narrow, wide in zip(array.shape, shape, strict=True)]).astype(np.float32)
