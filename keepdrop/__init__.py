"""Shrink a CNN you already trained: `keepdrop.prune(model, train, test)`; the command line is `keepdrop --help`.

Names are imported when they are first used, so that `import keepdrop` (and with it the id of the Gymnasium environment)
costs nothing, and none of them needs Hydra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agent.learning.trainer import AgentSettings
    from .envs.data.average_precision import MeanAveragePrecision
    from .envs.data.boxes import boxes_of
    from .envs.data.datasets import from_datasets
    from .envs.data.image_folder import from_folder
    from .envs.data.metrics import (
        F1,
        BalancedAccuracy,
        BinaryAccuracy,
        Closeness,
        Dice,
        MeanIoU,
        PixelAccuracy,
        Top1,
        TopK,
        Within,
    )
    from .envs.data.splits import split
    from .envs.files.pruned_network import load_pruned
    from .envs.groups.finding import find_groups
    from .envs.surgery.latency_meter import LatencyMeter
    from .envs.surgery.latency_profile import LatencyProfile, load_profile
    from .envs.surgery.limits import Limits
    from .envs.task import EvaluationSettings
    from .errors import UserError
    from .experiments.api.progress import Progress
    from .experiments.api.prune_and_apply import apply_agents, prune
    from .experiments.api.result import PruningResult
    from .experiments.api.settings import Settings
    from .experiments.deploy.export import export_int8, export_onnx
    from .experiments.deploy.profiling import profile
    from .experiments.engines.local_processes import LocalEngine
    from .experiments.engines.ray_actors import RayEngine
    from .experiments.pruning.agent_places import fetch_agent, share_agent
    from .experiments.training.train_settings import TrainSettings
    from .rewards.budget import Budget
    from .rewards.outcome import Outcome, Reward
    from .rewards.priced import Priced
    from .rewards.try_and_learn import TryAndLearn

_HOME = {
    "AgentSettings": "agent.learning.trainer",
    "BalancedAccuracy": "envs.data.metrics",
    "BinaryAccuracy": "envs.data.metrics",
    "Budget": "rewards.budget",
    "Closeness": "envs.data.metrics",
    "Dice": "envs.data.metrics",
    "EvaluationSettings": "envs.task",
    "F1": "envs.data.metrics",
    "LatencyMeter": "envs.surgery.latency_meter",
    "LatencyProfile": "envs.surgery.latency_profile",
    "Limits": "envs.surgery.limits",
    "LocalEngine": "experiments.engines.local_processes",
    "MeanAveragePrecision": "envs.data.average_precision",
    "MeanIoU": "envs.data.metrics",
    "Outcome": "rewards.outcome",
    "PixelAccuracy": "envs.data.metrics",
    "Priced": "rewards.priced",
    "Progress": "experiments.api.progress",
    "PruningResult": "experiments.api.result",
    "RayEngine": "experiments.engines.ray_actors",
    "Reward": "rewards.outcome",
    "Settings": "experiments.api.settings",
    "Top1": "envs.data.metrics",
    "TopK": "envs.data.metrics",
    "TrainSettings": "experiments.training.train_settings",
    "TryAndLearn": "rewards.try_and_learn",
    "UserError": "errors",
    "Within": "envs.data.metrics",
    "apply_agents": "experiments.api.prune_and_apply",
    "boxes_of": "envs.data.boxes",
    "export_int8": "experiments.deploy.export",
    "export_onnx": "experiments.deploy.export",
    "fetch_agent": "experiments.pruning.agent_places",
    "find_groups": "envs.groups.finding",
    "from_datasets": "envs.data.datasets",
    "from_folder": "envs.data.image_folder",
    "load_profile": "envs.surgery.latency_profile",
    "load_pruned": "envs.files.pruned_network",
    "profile": "experiments.deploy.profiling",
    "prune": "experiments.api.prune_and_apply",
    "share_agent": "experiments.pruning.agent_places",
    "split": "envs.data.splits",
}

__all__ = [
    "F1",
    "AgentSettings",
    "BalancedAccuracy",
    "BinaryAccuracy",
    "Budget",
    "Closeness",
    "Dice",
    "EvaluationSettings",
    "LatencyMeter",
    "LatencyProfile",
    "Limits",
    "LocalEngine",
    "MeanAveragePrecision",
    "MeanIoU",
    "Outcome",
    "PixelAccuracy",
    "Priced",
    "Progress",
    "PruningResult",
    "RayEngine",
    "Reward",
    "Settings",
    "Top1",
    "TopK",
    "TrainSettings",
    "TryAndLearn",
    "UserError",
    "Within",
    "apply_agents",
    "boxes_of",
    "export_int8",
    "export_onnx",
    "fetch_agent",
    "find_groups",
    "from_datasets",
    "from_folder",
    "load_profile",
    "load_pruned",
    "profile",
    "prune",
    "share_agent",
    "split",
]


_RENAMED = {"JudgeSettings": "EvaluationSettings"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("keepdrop")
    if name in _RENAMED:
        raise AttributeError(f"module 'keepdrop' has no attribute {name!r}; it is keepdrop.{_RENAMED[name]} now")
    if name not in _HOME:
        raise AttributeError(f"module 'keepdrop' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
