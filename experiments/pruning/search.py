"""Training the agent of one layer, without a configuration: what `keepdrop prune` and the Python interface share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...agent.learning.trainer import AgentSettings, Trainer, TrainingResult, train_agent
from ...agent.policies.policy import Policy
from ...envs.filter_pruning import FilterPruningVectorEnv
from ...envs.networks.checkpoint import hash_state
from ...envs.observation import STATISTIC_NAMES
from ...envs.task import LayerTask
from ...rewards.outcome import RewardFunction
from ..runs.seeds import derive_seed
from .decide import Decision

Report = Callable[[Trainer, Mapping[str, float]], None]


def train_on_layer(
    layer: LayerTask,
    policy: Policy,
    reward: RewardFunction,
    settings: AgentSettings,
    *,
    masks: int,
    images: int | None,
    seed: int,
    report: Report | None = None,
) -> tuple[TrainingResult, Decision]:
    """Train `policy` in place on a layer; decide greedily, with the best sampled masks as alternatives.

    Args:
        layer: whose filters are kept or dropped.
        policy: fresh, or trained before.
        reward: what the agent is trained on.
        settings: how it is trained.
        masks: sampled per update.
        images: reward images per update, the same ones for all its masks; None for all.
        seed: of the layer; sampled masks and drawn images have one each, derived from it.
        report: told about every update.
    """
    env = FilterPruningVectorEnv(layer, reward, masks, images)
    env.reset(seed=derive_seed(seed, "images"))
    generator = torch.Generator().manual_seed(derive_seed(seed, "masks"))
    result = train_agent(env, policy, settings, generator, callback=report)
    facts: dict[str, Any] = {
        "updates": result.n_updates,
        "converged": result.converged,
        "mask_images": round(sum(metrics["info/images"] for metrics in result.history) * masks),
    }
    if layer.task.settings.dtype != "float32" and result.best:
        # The decision, which is verified in float32 anyway, and the best sampled mask: more would cost what it saves.
        masks_MN = torch.stack([result.greedy, torch.as_tensor(result.best[0].mask)])
        facts["disagreement_with_float32"] = layer.disagreement_with_float32(masks_MN)
    alternatives = tuple(torch.as_tensor(scored.mask) for scored in result.best)
    return result, Decision(result.greedy, "agent", alternatives, facts)


def fit_facts(layer: LayerTask) -> dict[str, Any]:
    """What an agent was trained for, as far as it decides whether it can be used on a layer."""
    n_filters, n_weights = layer.observation.weights.shape
    return {
        "group": layer.group.name,
        "n_filters": n_filters,
        "n_weights": n_weights,
        "statistic_names": list(STATISTIC_NAMES),
    }


def agent_facts(layer: LayerTask, seed: int, result: TrainingResult) -> dict[str, Any]:
    """What is saved with an agent: its layer, its base, its reward split and how its training went."""
    curve = [metrics["reward_mean"] for metrics in result.history]
    return {
        "seed": seed,
        **fit_facts(layer),
        "base_hash": hash_state(layer.task.model),
        "base_accuracy": layer.task.base.accuracy,
        "reward_split_hash": layer.task.splits.hashes["reward"],
        "reward_curve": curve,
        "best_step": max(range(len(curve)), key=curve.__getitem__, default=None),
    }
