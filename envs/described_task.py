"""A network's decision, described so that an agent of any network can take it: rows of groups and a plan to correct.

Shapes: L groups, R columns of a row, N filters of all groups together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .group_descriptions import describe_groups
from .observation import STATISTIC_NAMES
from .one_shot import OneShotObservation, OneShotTask
from .repair.reconstruction import ReconstructionSettings
from .repair.reconstruction_error import ERROR_IMAGES, ErrorCurve, error_curves, reconstruction_scores
from .surgery.cutoff import keep_best, spread_evenly
from .surgery.filter_group import FilterGroup
from .surgery.targets import Target
from .task import LayerTask, PruningTask


@dataclass(frozen=True)
class DescribedObservation(OneShotObservation):
    """Beside what a `OneShotTask` shows: `descriptions` (L, R), and each filter's place in the plan, (N,) in (-1, 1).

    All float32; columns are `DESCRIPTION_NAMES`, and a higher place stays longer.
    """

    descriptions: np.ndarray
    places: np.ndarray

    def as_dict(self) -> dict[str, np.ndarray]:
        """The Gymnasium form."""
        return {**super().as_dict(), "descriptions": self.descriptions, "places": self.places}


class DescribedTask(OneShotTask):
    """All groups of a task as one decision at a target, with a row of numbers for every group.

    The plan is what the `reconstruction` criterion keeps, or equal shares in the order of l2 where it cannot read a
    layer of the network.

    Args:
        task: the network, its images and its groups.
        target: what is to be removed.
        repair: how cut networks are repaired; None leaves them as cut.
        layers: the groups one by one, with what was seen of them, if that is known already.
        curves: of the dense network (`curves_of`), if they are known already.
    """

    def __init__(
        self,
        task: PruningTask,
        target: Target,
        repair: ReconstructionSettings | None,
        layers: Sequence[LayerTask] | None = None,
        curves: Mapping[str, ErrorCurve] | None = None,
    ) -> None:
        super().__init__(task, repair, layers)
        self.target, self._curves = target, curves

    @cached_property
    def curves(self) -> Mapping[str, ErrorCurve]:
        """What giving up the filters of each group costs, by name."""
        return curves_of(self.task, self.groups) if self._curves is None else self._curves

    @cached_property
    def reconstruction_ranking(self) -> dict[str, Tensor] | None:
        """Scores (N,) of the `reconstruction` criterion by group name; None where it cannot read the network."""
        if len(self.curves) < len(self.groups):
            return None
        images, labels = self.task.fit_images(ERROR_IMAGES)
        goal, objective = self.task.constraints(self.target), self.task.objective
        try:
            return reconstruction_scores(self.task.model, goal, images, labels, objective=objective, curves=self.curves)
        except UserError:
            return None

    @property
    def ranking(self) -> dict[str, Tensor]:
        """The plan's scores (N,) by group name."""
        return self.even if self.reconstruction_ranking is None else self.reconstruction_ranking

    @property
    def even(self) -> dict[str, Tensor]:
        """Scores (N,) by group name that keep the same fraction of every group, in the order of l2."""
        self._see()
        return even_scores({layer.group.name: layer.observation.statistics for layer in self.layers})

    @cached_property
    def plan(self) -> dict[str, Tensor]:
        """The masks (N,) of the plan, by group name, before limits of the surgery."""
        return keep_best(self.task.constraints(self.target), self.ranking)

    @cached_property
    def observation(self) -> DescribedObservation:
        """What is seen of every group and of every filter, group after group."""
        seen = super().observation
        constraints = self.task.constraints(self.target)
        rows = describe_groups(
            self.task.model,
            self.task.cost,
            self.groups,
            [layer.observation for layer in self.layers],
            self.curves,
            # A group that the plan gives up whole is planned with less than a filter, since its logarithm is needed.
            [max(float(keep.double().mean()), 0.5 / len(keep)) for keep in self.plan.values()],
            constraints.removed,
        )
        places = torch.cat([_places(self.ranking[group.name]) for group in self.groups])
        return DescribedObservation(seen.weights, seen.statistics, seen.groups, rows, places.numpy())


def curves_of(task: PruningTask, groups: Sequence[FilterGroup]) -> dict[str, ErrorCurve]:
    """The curves of the groups that can be read, by name; none of them where one cannot."""
    images, labels = task.fit_images(ERROR_IMAGES)
    try:
        return error_curves(task.model, groups, images, labels, objective=task.objective)
    except UserError:
        return {}


def even_scores(statistics: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Scores (N,) by group name that keep the same fraction of every group, in the order of l2.

    Args:
        statistics: (N, F) by group name, columns `STATISTIC_NAMES`.
    """
    column = STATISTIC_NAMES.index("l2")
    return {name: spread_evenly(torch.from_numpy(values[:, column])) for name, values in statistics.items()}


def _places(scores_N: Tensor) -> Tensor:
    """Ranks spread over (-1, 1), float32; equal scores share theirs."""
    below = (scores_N[:, None] > scores_N).sum(1) + (scores_N[:, None] >= scores_N).sum(1)
    return (below / len(scores_N) - 1.0).float()
