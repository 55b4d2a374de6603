"""The whole network as one episode: a decision per filter group, judged together at the end.

Shapes: M masks, N filters (of the widest group), D weights a filter (of the widest), F statistics a filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..rewards.outcome import Outcome
from .evaluation.mask_evaluator import MaskEvaluator
from .surgery.cutting import prune
from .surgery.masking import MixKey
from .task import LayerTask, PruningTask


class SequentialTask:
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
        return self.task.evaluator([layer.group for layer in self.layers])

    def outcomes(self, masks: Sequence[Tensor], image_indices: Tensor | None = None) -> list[Outcome]:
        """What M combinations do; `masks[i]` is (M, N_i) bool for the group at position i."""
        chosen = {layer.group: mask for layer, mask in zip(self.layers, masks, strict=True)}
        mixes: dict[MixKey, Tensor] = {}
        for layer, mask in zip(self.layers, masks, strict=True):
            mixes.update(layer.mixes(mask))
        return self.task.outcomes(self._evaluator, chosen, mixes, image_indices)

    def cut(self, keeps: Sequence[Tensor]) -> nn.Module:
        """The network that `outcomes` judges, cut for real; `keeps[i]` is (N_i,) bool for the group at position i."""
        model = self.task.model
        for layer, keep in zip(self.layers, keeps, strict=True):
            if layer.compensation is not None:
                model = layer.compensation.folded(model, keep)
        return prune(model, {layer.group: keep for layer, keep in zip(self.layers, keeps, strict=True)})


def _padded(array: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.pad(array, [(0, wide - narrow) for narrow, wide in zip(array.shape, shape, strict=True)]).astype(
        np.float32
    )
