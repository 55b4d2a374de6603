"""Shrink a CNN you already trained: `keepdrop.prune(model, train, test)`; the command line is `keepdrop --help`.

Names are imported when they are first used, so that `import keepdrop` (and with it the id of the Gymnasium environment)
costs nothing, and none of them needs Hydra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agent.trainer import AgentSettings
    from .envs.coupling import find_groups
    from .envs.limits import Limits
    from .envs.metrics import Closeness, MeanIoU, PixelAccuracy, Top1, TopK, Within
    from .envs.pruned_file import load_pruned
    from .envs.task import JudgeSettings
    from .envs.train_settings import TrainSettings
    from .experiments.api import apply_agents, prune
    from .experiments.api_progress import Progress
    from .experiments.api_result import PruningResult
    from .experiments.api_settings import Settings
    from .rewards.budget import Budget
    from .rewards.errors import UserError
    from .rewards.outcome import Outcome, Reward
    from .rewards.priced import Priced
    from .rewards.try_and_learn import TryAndLearn

_HOME = {
    "AgentSettings": "agent.trainer",
    "Budget": "rewards.budget",
    "Closeness": "envs.metrics",
    "JudgeSettings": "envs.task",
    "Limits": "envs.limits",
    "MeanIoU": "envs.metrics",
    "Outcome": "rewards.outcome",
    "PixelAccuracy": "envs.metrics",
    "Priced": "rewards.priced",
    "Progress": "experiments.api_progress",
    "PruningResult": "experiments.api_result",
    "Reward": "rewards.outcome",
    "Settings": "experiments.api_settings",
    "Top1": "envs.metrics",
    "TopK": "envs.metrics",
    "TrainSettings": "envs.train_settings",
    "TryAndLearn": "rewards.try_and_learn",
    "UserError": "rewards.errors",
    "Within": "envs.metrics",
    "apply_agents": "experiments.api",
    "find_groups": "envs.coupling",
    "load_pruned": "envs.pruned_file",
    "prune": "experiments.api",
}

__all__ = [
    "AgentSettings",
    "Budget",
    "Closeness",
    "JudgeSettings",
    "Limits",
    "MeanIoU",
    "Outcome",
    "PixelAccuracy",
    "Priced",
    "Progress",
    "PruningResult",
    "Reward",
    "Settings",
    "Top1",
    "TopK",
    "TrainSettings",
    "TryAndLearn",
    "UserError",
    "Within",
    "apply_agents",
    "find_groups",
    "load_pruned",
    "prune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'keepdrop' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
