"""Agents as deciders, trained on the layer in front of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...agent.learning.trainer import AgentSettings, Trainer
from ...agent.policies.policy import Policy
from ...agent.saved_agent import SavedAgent, save_agent
from ...envs.observation import STATISTIC_NAMES
from ...envs.task import LayerTask
from ...errors import UserError
from ...rewards.outcome import RewardFunction
from ..runs.seeds import derive_seed
from .decide import AGENT, Decision
from .search import agent_facts, train_on_layer
from .trained_agents import trained_further

PolicyFactory = Callable[..., Any]
LayerReport = Callable[[LayerTask, Trainer, Mapping[str, float]], None]


class TrainLayerAgents:
    """Trains a fresh agent on each layer; saves it in the layer's folder.

    Args:
        make_policy: see `call_policy_factory`.
        reward: what an agent is trained on.
        settings: how it is trained.
        masks, images: sampled per update, and reward images per mask (None: all).
        report: told about every update.
        known: trained agents by layer, which are trained further instead of a fresh one.
        facts: saved with every agent (command, configuration).
    """

    def __init__(
        self,
        make_policy: PolicyFactory,
        reward: RewardFunction,
        settings: AgentSettings,
        masks: int,
        images: int | None,
        report: LayerReport,
        known: Mapping[str, SavedAgent] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.make_policy, self.reward, self.settings = make_policy, reward, settings
        self.masks, self.images, self.report = masks, images, report
        self.known, self.facts = dict(known or {}), dict(facts or {})

    def __call__(self, layer: LayerTask, working: Path, seed: int) -> Decision:
        """Train on `layer`, save, and decide greedily; the best sampled masks are the alternatives."""
        policy = self._policy(layer, seed)
        result, decision = train_on_layer(
            layer,
            policy,
            self.reward,
            self.settings,
            masks=self.masks,
            images=self.images,
            seed=seed,
            report=lambda trainer, metrics: self.report(layer, trainer, metrics),
        )
        save_agent(working / AGENT, policy, {**self.facts, **agent_facts(layer, seed, result)})
        return decision

    def _policy(self, layer: LayerTask, seed: int) -> Policy:
        saved = self.known.get(layer.group.name)
        if saved is None:
            n_filters, n_weights = layer.observation.weights.shape
            return call_policy_factory(self.make_policy, n_filters, n_weights, derive_seed(seed, "policy"))
        return trained_further(saved, layer)


def call_policy_factory(factory: PolicyFactory, n_filters: int, n_weights: int, seed: int = 0) -> Any:
    """A fresh policy: `factory` gets whatever it asks for by name.

    Offered: n_filters, n_weights, n_statistics, statistic_names, seed.
    """
    offered = {
        "n_filters": n_filters,
        "n_weights": n_weights,
        "n_statistics": len(STATISTIC_NAMES),
        "statistic_names": STATISTIC_NAMES,
        "seed": seed,
    }
    try:
        wanted = inspect.signature(factory).parameters
        return factory(**{name: value for name, value in offered.items() if name in wanted})
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise UserError(f"policy could not be built: {error}") from error
