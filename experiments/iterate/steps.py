"""The interleaved method, step by step: drop the least important filters of the network, train a little, repeat.

Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference" (ICLR 2017), section 2.

Shapes: N filters of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...agent.criteria import CRITERIA, normalised, scores
from ...envs.data.images import LabelledImages
from ...envs.data.objective import objective_of
from ...envs.networks.cost import Cost, count_cost
from ...envs.networks.memory_layout import suited
from ...envs.observation import STATISTIC_NAMES, Observation, observe
from ...envs.surgery.filter_group import FilterGroup
from ...envs.surgery.group_cost import pruned_cost
from ...envs.surgery.targets import SLACK
from ...errors import UserError
from ..runs.seeds import derive_seed
from ..training.augment import Augment
from ..training.loop import TrainProgress, TrainSettings, fit_network
from .running_scores import RUNNING, RunningScores, collecting

RESOURCES = ("macs", "params")
FEW = 8  # images behind the statistics of a criterion that reads weights: they do not matter


@dataclass(frozen=True)
class IterateSettings:
    """How filters go.

    Args:
        criterion: one of `keepdrop.agent.criteria.CRITERIA`.
        step: filters removed before the next training.
        minibatches: of training between two removals; the scores are averages over them.
        macs_weight: subtracted from a filter's score, times the share of the network's MACs that it costs (the paper's
            lambda, with the cost as a fraction); 0 leaves costs out.
        train: how these minibatches are trained; `epochs` is not used.
    """

    criterion: str
    step: int
    minibatches: int
    macs_weight: float
    train: TrainSettings

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise UserError(f"criterion is {self.criterion!r}; expected one of {', '.join(CRITERIA)}.")


@dataclass(frozen=True)
class Goal:
    """When to stop.

    Args:
        removed: fraction of the dense network's resource that is to go; None continues as long as the bound holds.
        resource: "macs" or "params".
        drop_bound: accuracy that may be lost on the reward split, after training; None is no bound.
    """

    removed: float | None
    resource: str
    drop_bound: float | None

    def __post_init__(self) -> None:
        if self.resource not in RESOURCES:
            raise UserError(f"target.resource is {self.resource!r}; expected one of {', '.join(RESOURCES)}.")
        if self.removed is not None and not 0 < self.removed < 1:
            raise UserError(f"target.removed is {self.removed:g}; expected a fraction between 0 and 1, or null.")

    def is_met(self, base: Cost, macs: int, params: int) -> bool:
        """Whether enough is gone; never with `removed=None`."""
        if self.removed is None:
            return False
        before, now = (base.macs, macs) if self.resource == "macs" else (base.params, params)
        return now <= before * (1 - self.removed) + SLACK * before


def train_and_score(
    model: nn.Module,
    groups: Sequence[FilterGroup],
    data: LabelledImages,
    settings: IterateSettings,
    seed: int,
    *,
    augment: Augment | None = None,
    teacher: nn.Module | None = None,
    progress: Callable[[TrainProgress], None] | None = None,
) -> dict[str, Tensor]:
    """Train `model` in place on `minibatches` minibatches; scores (N,) by group, as seen meanwhile."""
    batch = settings.train.batch_size
    steps_per_epoch = max(1, -(-len(data) // batch) - (len(data) % batch == 1))
    schedule = replace(settings.train, epochs=settings.minibatches / steps_per_epoch)
    with collecting(model, groups) as seen:
        fit_network(model, data, schedule, seed=seed, augment=augment, teacher=teacher, progress=progress)
    if settings.criterion in RUNNING:
        return {group.name: _running(seen, group, settings.criterion) for group in groups}
    images, labels = data.batch(torch.arange(min(FEW, len(data))))
    device, model = next(model.parameters()).device, model.eval()
    images, labels, objective = suited(model, images.to(device)), labels.to(device), objective_of(data)
    seen_at_rest = {group.name: observe(model, group, images, labels, objective=objective) for group in groups}
    return {name: _resting(name, each, settings.criterion, seed) for name, each in seen_at_rest.items()}


def _running(seen: RunningScores, group: FilterGroup, criterion: str) -> Tensor:
    column = seen.column(group.name, criterion)
    observation = {"weights": torch.zeros(group.n_filters, 1), "statistics": column[:, None]}
    return scores(observation, (criterion,), criterion)


def _resting(name: str, observation: Observation, criterion: str, seed: int) -> Tensor:
    found = {key: torch.from_numpy(each) for key, each in observation.as_dict().items()}
    generator = torch.Generator().manual_seed(derive_seed(seed, criterion, name))
    return scores(found, STATISTIC_NAMES, criterion, generator)


def ranking(
    model: nn.Module, cost: Cost, groups: Sequence[FilterGroup], found: Mapping[str, Tensor], settings: IterateSettings
) -> list[tuple[int, int]]:
    """All filters as (position of the group, number), the least important first; of equal ones the first.

    Scores are l2-normalised in each layer, then `macs_weight` times the filter's share of the MACs is subtracted.
    """
    flat = []
    for position, group in enumerate(groups):
        values = normalised(found[group.name].double(), settings.criterion)
        if settings.macs_weight:
            fewer, _ = pruned_cost(model, cost, {group: group.n_filters - 1})
            values = values - settings.macs_weight * (cost.macs - fewer) / cost.macs
        flat += [(float(value), position, number) for number, value in enumerate(values)]
    return [(position, number) for _, position, number in sorted(flat)]


@dataclass(frozen=True)
class Allowed:
    """What the limits of the surgery leave open, by group name; a group that is not named may lose all but one.

    Args:
        counts: numbers of filters that may be left.
        protected: numbers, as the group has them now, of filters that stay.
    """

    counts: Mapping[str, Collection[int]] = field(default_factory=dict)
    protected: Mapping[str, Collection[int]] = field(default_factory=dict)

    def least(self, name: str) -> int:
        """Filters that a group keeps in any case."""
        return max(1, min(self.counts.get(name, (1,))))

    def fits(self, name: str, count: int) -> bool:
        """Whether a group may be left with so many."""
        return name not in self.counts or count in self.counts[name]


def removal(
    model: nn.Module,
    groups: Sequence[FilterGroup],
    found: Mapping[str, Tensor],
    settings: IterateSettings,
    goal: Goal,
    base: Cost,
    example: Tensor,
    allowed: Allowed | None = None,
) -> dict[FilterGroup, Tensor]:
    """Masks (N,) of the next step: the `step` least important filters go, fewer where the goal is met before.

    The last filter of a group stays. Under `allowed` counts filters of a group wait until as many are among the least
    important ones as may go together, so a step can be a few filters longer. Empty when nothing can go.
    """
    cost, allowed = count_cost(model, example), allowed or Allowed()
    masks: dict[FilterGroup, Tensor] = {}
    counts = {group: group.n_filters for group in groups}
    waiting: dict[FilterGroup, list[int]] = {group: [] for group in groups}
    gone = 0
    for position, number in ranking(model, cost, groups, found, settings):
        group = groups[position]
        if gone >= settings.step or goal.is_met(base, *pruned_cost(model, cost, counts)):
            break
        left = counts[group] - len(waiting[group]) - 1
        if left < allowed.least(group.name) or number in allowed.protected.get(group.name, ()):
            continue
        waiting[group].append(number)
        if allowed.fits(group.name, left):
            masks.setdefault(group, torch.ones(group.n_filters, dtype=torch.bool))[waiting[group]] = False
            counts[group], gone = left, gone + len(waiting[group])
            waiting[group] = []
    return masks


def from_lists(groups: Sequence[FilterGroup], gone: Mapping[str, Any]) -> dict[FilterGroup, Tensor]:
    """Masks (N,) of the groups that lose something, from the numbers of what goes, by group name."""
    masks = {}
    for group in groups:
        if group.name in gone:
            masks[group] = torch.ones(group.n_filters, dtype=torch.bool)
            masks[group][gone[group.name]] = False
    return masks
