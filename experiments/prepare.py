"""Everything that can be wrong with what the user gave is found here, before a run folder exists."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import nn

from ..envs.coupling import find_groups
from ..envs.groups import select_groups
from ..envs.splits import Splits
from ..envs.task import Base, JudgeSettings, PruningTask, measure_base
from ..rewards.try_and_learn import check_drop_bound
from .build import Constructor, build_augment, build_splits, load_network, network_constructor, resolve_device
from .doors import plain, settings
from .seeds import derive_seed


@dataclass
class Inputs:
    """The checked inputs of a pruning command; `dense` and `base` are None where the base is yet to be trained."""

    splits: Splits
    construct: Constructor
    device: torch.device
    dense: nn.Module | None
    base: Base | None

    def task(self, dense: nn.Module, config: DictConfig) -> PruningTask:
        """The pruning task on the dense network."""
        self.base = self.base or measure_base(dense, self.splits, self.device)
        return PruningTask(
            dense,
            self.splits,
            base=self.base,
            settings=settings(config.judge, JudgeSettings),
            layers=plain(config.get("layers")),
            seed=derive_seed(config.seed, "task"),
            device=self.device,
        )


def prepare(config: DictConfig) -> Inputs:
    """Check data, network, checkpoint, base accuracy, drop bound and layer names; raises `UserError`."""
    check_drop_bound(config.drop_bound)
    settings(config.judge, JudgeSettings)
    device = resolve_device(config.device)
    build_augment(config.augment)
    splits = build_splits(config)
    construct = network_constructor(config.network, derive_seed(config.seed, "init"))
    dense = base = None
    if config.checkpoint is not None:
        dense = load_network(construct, config.checkpoint).to(device)
        base = measure_base(dense, splits, device)
    example = splits.reward.batch(torch.arange(1))[0].to(device)
    plan = find_groups(dense if dense is not None else construct().eval().to(device), example)
    select_groups(plan, plain(config.get("layers")))
    return Inputs(splits, construct, device, dense, base)
