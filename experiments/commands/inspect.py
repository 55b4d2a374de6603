"""`keepdrop inspect`: before anything is trained, which filters can go, and what is skipped and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ...envs.data.packing import packed_batch
from ...envs.evaluation.masked_network import MaskedNetwork
from ...envs.groups.finding import find_groups
from ...envs.networks.answers import as_called
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
    images, packing = (example, None) if isinstance(example, torch.Tensor) else packed_batch(example)
    construct = NetworkConstructor(config.network, config.seed, images, packing)
    model = construct().eval()
    if config.checkpoint is not None:
        load_checkpoint(model, config.checkpoint)
    described = describe(model, images)
    described["notes"] += construct.notes
    if config.json:
        print(json.dumps(described, indent=2))
        return described
    terminal = Terminal()
    terminal.inspection(described)
    evaluation = described["evaluation"]
    if evaluation["method"] != "split":
        terminal.say(f"masks run through the whole network, every one anew: {evaluation['reason']}")
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


def describe(model: nn.Module, example: torch.Tensor) -> dict[str, Any]:
    """Groups and skipped convolutions of a network that is ready (`ready_network`) as plain data, from some images."""
    try:
        cost = count_cost(model, example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(each.shape)) for each in tensors_of(as_called(model, example)))
        raise UserError(
            f"The network does not run on an input {shapes} ({first_line(error)}); give the shape "
            "of your images, input_shape=[channels,height,width], or example_inputs=mine.example, a function that "
            "returns what your forward takes."
        ) from error
    plan = find_groups(model, example, whole_blocks=True)
    return {
        "macs": cost.macs,
        "params": cost.params,
        "groups": [describe_group(model, cost, group) for group in plan.groups],
        "skipped": [{"name": item.name, "reason": item.reason} for item in plan.skipped],
        "evaluation": evaluation_of(model, plan, example),
        "notes": list(plan.notes),
    }


def evaluation_of(model: nn.Module, plan: GroupPlan, images: torch.Tensor) -> dict[str, str]:
    """How the masks of a search run: "split" (what no mask touches is computed once), or "whole"."""
    several = resized(images, 3)
    assert isinstance(several, torch.Tensor)
    network = MaskedNetwork(model, plan.groups[:1], several)
    return {"method": network.method, "reason": network.why_whole}


def describe_group(model: nn.Module, cost: Cost, group: FilterGroup) -> Mapping[str, Any]:
    """One group: who goes together, who reads it, and the MACs and parameters that go when all its filters go."""
    macs, params = pruned_cost(model, cost, {replace(group, branch=None): 0})
    return {
        "name": group.name,
        "n_filters": group.n_filters,
        "coupled_with": [cut.module for cut in group.producers[1:]],
        "consumers": [cut.module for cut in group.consumers],
        "may_vanish": group.least == 0,
        "macs": cost.macs - macs,
        "params": cost.params - params,
    }
