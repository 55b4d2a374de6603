"""A whole network's decision whose masks are judged by workers: `OneShotTask.outcomes`, spread over an engine.

Shapes: M masks, N filters, B images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ...envs.one_shot import OneShotTask
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.task import PruningTask
from ...rewards.outcome import Outcome
from .engine import Engine, Workers

Item = tuple[ReconstructionSettings | None, Tensor, Tensor | None]


class SpreadTask(OneShotTask):
    """The same decision with the same outcomes, mask for mask.

    Args:
        one_shot: the decision; observations and the final cut are made here, as ever.
        spread: hold `JudgingTask` of the same network.
    """

    def __init__(self, one_shot: OneShotTask, spread: Workers) -> None:
        super().__init__(one_shot.task, one_shot.repair, one_shot.layers)
        self.spread = spread

    def with_repair(self, repair: ReconstructionSettings | None) -> SpreadTask:
        """As in `OneShotTask`, judged by the same workers."""
        return self if repair == self.repair else SpreadTask(super().with_repair(repair), self.spread)

    def outcomes(self, masks_MN: Tensor, image_indices: Tensor | None = None) -> list[Outcome]:
        """As in `OneShotTask`."""
        masks_MN = torch.as_tensor(masks_MN, dtype=torch.bool)
        if masks_MN.dim() != 2 or len(masks_MN) == 0:
            return super().outcomes(masks_MN, image_indices)
        # One part a worker: masks of a part are judged side by side, and those of one target cost about the same.
        size = -(-len(masks_MN) // self.spread.count)
        items: list[Item] = [(self.repair, part.clone(), image_indices) for part in masks_MN.split(size)]
        return [outcome for found in self.spread.in_order(_judge, items) for outcome in found]


class JudgingTask(PruningTask):
    """What workers need of a task that was not pruned yet: reward images, and the fit images of the repair.

    Args:
        task: the whole one.
        images: of the fit split that a repair takes at most.
    """

    def __init__(self, task: PruningTask, images: int) -> None:
        self.__dict__.update(task.__dict__)
        self.origin = self.trained = self
        fitted = task.fit_images(images)
        self._fitted = tuple(each.cpu() for each in fitted)
        self.splits = replace(task.splits, fit=task.splits.reward, report=task.splits.reward)
        self.__dict__.pop("reward_images", None)  # made again of the split, on the worker's device

    def fit_images(self, count: int) -> tuple[Tensor, Tensor]:
        """The first of those that the whole task would give."""
        images, labels = (each[:count].to(self.device) for each in self._fitted)
        return images, labels


@contextmanager
def spread_over(engine: Engine, one_shot: OneShotTask) -> Iterator[OneShotTask]:
    """The decision with its masks judged by the workers of an engine, which end with the context.

    Raises:
        UserError: workers are gone for good, or the task cannot be sent to them.
    """
    if engine.is_here:
        yield one_shot
        return
    lost = "A worker that judges masks died, perhaps because memory ran out; give each more, or use fewer."
    images = 1 if one_shot.repair is None else one_shot.repair.images
    task = one_shot.task
    carried = JudgingTask(task, images) if task.origin is task and task.trained is task else task
    with engine.open(_judging, carried, lost=lost) as spread:
        yield SpreadTask(one_shot, spread)


def _judging(task: PruningTask) -> OneShotTask:
    return OneShotTask(task, None)


def _judge(held: OneShotTask, item: Item) -> list[Outcome]:
    repair, masks_MN, image_indices = item
    return _repaired(held, repair).outcomes(masks_MN, image_indices)


def _repaired(held: OneShotTask, repair: ReconstructionSettings | None) -> OneShotTask:
    """The task under a repair, made once a worker: the dense network's part of it is measured once."""
    known: dict[ReconstructionSettings | None, OneShotTask] = held.__dict__.setdefault("_by_repair", {})
    if repair not in known:
        known[repair] = held.with_repair(repair)
    return known[repair]
