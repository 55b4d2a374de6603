"""`keepdrop inspect`: before anything is trained, which filters can go, and what is skipped and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ..envs.checkpoint import load_checkpoint
from ..envs.cost import Cost, count_cost
from ..envs.coupling import find_groups
from ..envs.group_cost import pruned_cost
from ..envs.groups import FilterGroup
from ..rewards.errors import UserError
from .build import network_constructor
from .console import Terminal
from .doors import hydra_door, plain


def door() -> None:
    """Entry point of the command."""
    hydra_door("inspect", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Print one row a filter group, or JSON; nothing is written."""
    model = network_constructor(config.network, config.seed)().eval()
    if config.checkpoint is not None:
        load_checkpoint(model, Path(config.checkpoint))
    example = torch.randn(1, *plain(config.input_shape), generator=torch.Generator().manual_seed(config.seed))
    described = describe(model, example)
    if config.json:
        print(json.dumps(described, indent=2))
    else:
        Terminal().inspection(described)
    return described


def describe(model: nn.Module, example: torch.Tensor) -> dict[str, Any]:
    """Groups and skipped convolutions of `model` as plain data; `example` is one input (1, C, H, W)."""
    try:
        cost = count_cost(model, example)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"The network does not run on an input {tuple(example.shape)} ({str(error).splitlines()[0]}); give "
            "the shape of your images: input_shape=[channels,height,width]."
        ) from error
    plan = find_groups(model, example)
    return {
        "macs": cost.macs,
        "params": cost.params,
        "groups": [describe_group(model, cost, group) for group in plan.groups],
        "skipped": [{"name": item.name, "reason": item.reason} for item in plan.skipped],
    }


def describe_group(model: nn.Module, cost: Cost, group: FilterGroup) -> Mapping[str, Any]:
    """One group: who goes together, who reads it, and the MACs and parameters that go when all its filters go."""
    macs, params = pruned_cost(model, cost, {group: 0})
    return {
        "name": group.name,
        "n_filters": group.n_filters,
        "coupled_with": [cut.module for cut in group.producers[1:]],
        "consumers": [cut.module for cut in group.consumers],
        "macs": cost.macs - macs,
        "params": cost.params - params,
    }
