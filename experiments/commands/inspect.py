"""`keepdrop inspect`: before anything is trained, which filters can go, and what is skipped and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ...envs.evaluation.masked_network import MaskedNetwork
from ...envs.groups.finding import find_groups
from ...envs.networks.checkpoint import load_checkpoint
from ...envs.networks.cost import Cost, count_cost
from ...envs.networks.inputs import resized, tensors_of
from ...envs.networks.module_kinds import Inputs
from ...envs.surgery.filter_group import FilterGroup, GroupPlan
from ...envs.surgery.group_cost import pruned_cost
from ...errors import UserError, first_line
from ..config.build import NetworkConstructor, build
from ..config.entry_point import plain, run_with_hydra
from ..config.ignored import Ignored, refuse_ignored
from ..runs.console import Terminal


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("inspect", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Print one row per filter group, or JSON; nothing is written."""
    refuse_ignored(config, IGNORED)
    example = example_of(config)
    construct = NetworkConstructor(config.network, config.seed, example)
    model = construct().eval()
    if config.checkpoint is not None:
        load_checkpoint(model, Path(config.checkpoint))
    described = describe(model, example)
    described["notes"] += construct.notes
    if config.json:
        print(json.dumps(described, indent=2))
        return described
    terminal = Terminal()
    terminal.inspection(described)
    evaluation = described["evaluation"]
    if evaluation["method"] != "split":
        terminal.say(f"{HOW[evaluation['method']]}: {evaluation['reason']}")
    for note in described["notes"]:
        terminal.warn(note)
    return described


IGNORED = (
    Ignored("input_shape", "example_inputs says what goes in.", lambda config: config.example_inputs is not None),
)


def example_of(config: DictConfig) -> Inputs:
    """What the network is run on: what the user's `example_inputs` returns, or random images of `input_shape`."""
    if config.example_inputs is None:
        if not config.input_shape or min(config.input_shape) < 1:
            raise UserError(
                f"input_shape is {list(config.input_shape)}; expected the channels, height and width of one image."
            )
        return torch.randn(3, *plain(config.input_shape), generator=torch.Generator().manual_seed(config.seed))
    node = config.example_inputs
    node = OmegaConf.create({"_target_": node}) if isinstance(node, str) else node
    example = build(node, "example_inputs")
    example = tuple(example) if isinstance(example, list) else example
    if not isinstance(example, torch.Tensor | tuple | Mapping) or not tensors_of(example):
        raise UserError(
            f"example_inputs returned {type(example).__name__}; expected a tensor with the batch axis first, a tuple "
            "of positional arguments with one, or a dict of keyword arguments with one."
        )
    return example


def describe(model: nn.Module, example: Inputs) -> dict[str, Any]:
    """Groups and skipped convolutions of `model` as plain data; `example` is one input (`find_groups`)."""
    try:
        cost = count_cost(model, example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(each.shape)) for each in tensors_of(example))
        raise UserError(
            f"The network does not run on an input {shapes} ({first_line(error)}); give the shape "
            "of your images, input_shape=[channels,height,width], or example_inputs=mine.example, a function that "
            "returns what your forward takes."
        ) from error
    plan = find_groups(model, example)
    return {
        "macs": cost.macs,
        "params": cost.params,
        "groups": [describe_group(model, cost, group) for group in plan.groups],
        "skipped": [{"name": item.name, "reason": item.reason} for item in plan.skipped],
        "evaluation": evaluation_of(model, plan, example),
        "notes": list(plan.notes),
    }


HOW = {
    "whole": "masks run through the whole network, every one anew",
    "none": "keepdrop prune cannot judge masks of this network (keepdrop.envs.surgery.cutting.prune cuts it)",
}


def evaluation_of(model: nn.Module, plan: GroupPlan, example: Inputs) -> dict[str, str]:
    """How the masks of a search run: "split" (what no mask touches is computed once), "whole", or "none"."""
    if not isinstance(example, torch.Tensor):
        return {"method": "none", "reason": "the network takes several inputs, and data sources give images alone"}
    images = resized(example, 3)
    assert isinstance(images, torch.Tensor)
    network = MaskedNetwork(model, plan.groups[:1], images)
    return {"method": network.method, "reason": network.why_whole}


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
