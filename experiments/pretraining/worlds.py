"""Worlds of a pretraining: one network at one target each, where actions are tried and rewarded.

Shapes: L groups, R columns of a row, N filters, M samples, A numbers of an action.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ...agent.learning.many_networks import Experience, explore
from ...agent.learning.rollout import evaluate_masks
from ...agent.policies.group_policy import GroupPolicy
from ...atomic import write_atomically
from ...envs.described_task import DescribedObservation, DescribedTask, curves_of, even_scores
from ...envs.filter_pruning import FilterPruningVectorEnv
from ...envs.group_descriptions import DESCRIPTION_NAMES
from ...envs.observation import STATISTIC_NAMES
from ...envs.one_shot import OneShotTask
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.surgery.targets import Target
from ...envs.task import PruningTask
from ...errors import UserError
from ...strict_json import parse_json
from ..config.schema import SamplingConfig, SplitConfig
from ..pruning.network_search import kept_accuracy, projection
from ..runs.seeds import derive_seed
from .zoo import ZooNetwork

CONTROLS = ("policy", "plan", "uniform")
"""Judged beside the samples of a round, on the same images: the policy's mean action, the plan, equal shares."""


class DamagedFileError(UserError):
    """What was kept of a network cannot be read; nothing is wrong with the network."""


class Subject:
    """A network of the zoo, loaded, with what was seen of it kept in a folder.

    Args:
        network: of the zoo.
        splits: how its images are split.
        fit_images: how many are fitted on.
        sampling: what a round costs.
        folder: of this network; what was seen of it is there if it was described before.
    """

    def __init__(
        self, network: ZooNetwork, splits: SplitConfig, fit_images: int, sampling: SamplingConfig, folder: Path
    ) -> None:
        self.network, self.folder = network, folder
        self.task = PruningTask(network.load(), network.splits(splits, fit_images))
        self.repair = ReconstructionSettings(images=sampling.repair_images, places=sampling.repair_places)
        self._one_shot: OneShotTask | None = None
        self._curves: Mapping[str, Any] | None = None

    def world(self, target: Target) -> DescribedTask:
        """The network at a target; it is described at most once, then read from the folder."""
        described = DescribedTask(self.task, target, self.repair)
        file = self.folder / f"{target_name(target)}.safetensors"
        if file.is_file():
            described.observation = _read(file, described)
            return described
        described.task.constraints(target).check()
        if self._one_shot is None:
            self._one_shot = OneShotTask(self.task, None)
            self._curves = curves_of(self.task, self.task.groups)
        described = DescribedTask(self.task, target, self.repair, self._one_shot.layers, self._curves)
        seen = {key: torch.from_numpy(value) for key, value in described.observation.as_dict().items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save_tensors(seen))
        return described


def target_name(target: Target) -> str:
    """A target as part of a file's name."""
    return str(target).replace(", ", "-").replace("=", "-")


def _read(file: Path, described: DescribedTask) -> DescribedObservation:
    try:
        seen = load_tensors(file.read_bytes())
        read = DescribedObservation(**{key: value.numpy() for key, value in seen.items()})
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{str(file)!r} is damaged ({error}); delete it, and it is measured again.") from error
    n_filters, n_groups = described.n_filters, len(described.groups)
    expected = {
        "statistics": (n_filters, len(STATISTIC_NAMES)),
        "groups": (n_filters,),
        "descriptions": (n_groups, len(DESCRIPTION_NAMES)),
        "places": (n_filters,),
    }
    found = read.as_dict()
    fits = all(found[name].shape == shape for name, shape in expected.items()) and len(read.weights) == n_filters
    if not fits or not all(np.isfinite(value).all() for value in found.values()):
        raise DamagedFileError(f"{str(file)!r} describes another network; delete it, and it is measured again.")
    return read


def tried(world: DescribedTask, policy: GroupPolicy, sampling: SamplingConfig, seed: int) -> dict[str, Any]:
    """What a round in one world brings, JSON-able: an `Experience` and the controls' accuracies relative to the base.

    Masks are judged through the environment, all on the same images.
    """
    observation = {key: torch.from_numpy(value) for key, value in world.observation.as_dict().items()}
    rows, project = observation["descriptions"], projection(world, world.target)
    with torch.no_grad():
        mean = policy.action(rows).double()
        scale = sampling.scales.vector(len(rows), len(mean))
        actions = explore(mean, scale, sampling.samples, torch.Generator().manual_seed(derive_seed(seed, "explore")))
        plan = policy.plan(len(rows))
        masks = [project(scores) for scores in policy.scores_of(observation, [*actions, mean, plan])]
        masks.append(project(_even(world)))
    env = FilterPruningVectorEnv(world, kept_accuracy, len(masks), sampling.images)
    env.reset(seed=derive_seed(seed, "images"))
    rewards, infos = evaluate_masks(env, torch.stack(masks))
    counts = [[int(part.sum()) for part in world.named(mask).values()] for mask in masks[-len(CONTROLS) :]]
    return {
        "rows": rows.tolist(),
        "mean": mean.tolist(),
        "scale": scale.tolist(),
        "actions": actions.tolist(),
        "rewards": rewards[: len(actions)].tolist(),
        "controls": dict(zip(CONTROLS, rewards[len(actions) :].tolist(), strict=True)),
        "counts": dict(zip(CONTROLS, counts, strict=True)),
        "widths": [group.n_filters for group in world.groups],
        "macs_removed": [1 - float(infos["macs_fraction"][-len(CONTROLS) + i]) for i in range(len(CONTROLS))],
    }


def _even(world: DescribedTask) -> Tensor:
    """Scores (N,) that keep the same fraction of every group, in the order of l2."""
    seen = world.observation
    parts = {group.name: seen.statistics[seen.groups == place] for place, group in enumerate(world.groups)}
    return torch.cat(list(even_scores(parts).values()))


def experience(record: Mapping[str, Any]) -> Experience:
    """What `tried` noted, as the policy learns from it."""
    rows = torch.tensor(record["rows"], dtype=torch.float32)
    mean, scale, actions, rewards = (
        torch.tensor(record[key], dtype=torch.float64) for key in ("mean", "scale", "actions", "rewards")
    )
    if rows.shape[1:] != (len(DESCRIPTION_NAMES),) or len(mean) <= len(rows):
        raise ValueError("rows of another version")
    if scale.shape != mean.shape or actions.shape != (len(rewards), len(mean)) or len(rewards) % 2:
        raise ValueError("actions that do not belong together")
    return Experience(rows, mean, scale, actions, rewards)


def read_record(file: Path) -> dict[str, Any]:
    """A round in one world, from its file; UserError for a damaged one."""
    try:
        found: dict[str, Any] = parse_json(file.read_text())
        experience(found)
        if not all(isinstance(found["controls"][name], float) for name in CONTROLS):
            raise TypeError("controls are accuracies")
        return found
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{str(file)!r} is damaged; delete it, and this round is tried again there.") from error


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """`tried`, on disk whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(record, allow_nan=False) + "\n").encode())
