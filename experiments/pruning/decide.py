"""Who decides what a layer keeps: an agent being trained, a trained agent, or a criterion at given counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...agent.criteria import CRITERIA, CriterionAgent
from ...envs.observation import STATISTIC_NAMES
from ...envs.repair.reconstruction_error import ERROR_IMAGES, RECONSTRUCTION, ErrorCurve, error_curves
from ...envs.task import DecisionTask, LayerTask
from ..runs.seeds import derive_seed

AGENT = "agent"  # the folder that a decision's agent is saved in
CONTROLS = (*CRITERIA, RECONSTRUCTION)


@dataclass(frozen=True)
class Decision:
    """A layer's decision before it is verified.

    Attributes:
        keep: (N,) bool, the decision itself.
        source: who decided ("agent", "trained agent", "l1", ...).
        alternatives: masks (N,) to fall back to.
        facts: JSON-able facts about the search (updates, mask-images, converged).
    """

    keep: Tensor
    source: str
    alternatives: tuple[Tensor, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Decider(Protocol):
    """Decides one layer; may write into the layer's working folder."""

    def __call__(self, layer: LayerTask, working: Path, seed: int) -> Decision:
        """Return the decision for `layer`."""
        ...


def observation_tensors(task: DecisionTask) -> dict[str, Tensor]:
    """What an agent sees of a layer or network, as tensors."""
    return {key: torch.from_numpy(value) for key, value in task.observation.as_dict().items()}


class AskCriterion:
    """Asks a criterion, at given counts: the control beside an agent.

    Args:
        criterion: one of `CONTROLS`: of `keepdrop.agent.criteria.CRITERIA`, or "reconstruction", which gives up the
            filters of the layer one by one, always the one whose loss its readers make up for best.
        counts: filters to keep, by layer name.
    """

    def __init__(self, criterion: str, counts: Mapping[str, int]) -> None:
        self.criterion = criterion
        self.counts = counts

    def __call__(self, layer: LayerTask, working: Path, seed: int) -> Decision:
        """The criterion's mask."""
        n_keep = self.counts[layer.group.name]
        if n_keep == 0:  # of a block that vanishes
            return Decision(torch.zeros(layer.n_filters, dtype=torch.bool), self.criterion)
        if self.criterion == RECONSTRUCTION:
            return Decision(_least_error(layer).keep(n_keep), self.criterion)
        agent = CriterionAgent(self.criterion, torch.Generator().manual_seed(derive_seed(seed, self.criterion)))
        keep = agent.keep(observation_tensors(layer), STATISTIC_NAMES, n_keep)
        return Decision(keep, self.criterion)


def _least_error(layer: LayerTask) -> ErrorCurve:
    task, group = layer.task, layer.group
    images, labels = task.fit_images(ERROR_IMAGES)
    return error_curves(task.model, [group], images, labels, objective=task.objective)[group.name]
