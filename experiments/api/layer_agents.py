"""The agents of a search from Python, one for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...agent.learning.trainer import AgentSettings
from ...agent.policies.policy import Policy
from ...agent.saved_agent import SavedAgent, save_agent
from ...envs.task import LayerTask
from ...rewards.outcome import RewardFunction
from ..pruning.decide import AGENT, Decision
from ..pruning.input_checks import PolicyFactory, call_policy_factory
from ..pruning.search import agent_facts, train_on_layer
from ..pruning.trained_agents import trained_further
from ..runs.seeds import derive_seed
from .progress import Reporter


class LayerAgents:
    """Trains a fresh agent on each layer; saves it in the layer's folder.

    Args:
        make_policy: see `call_policy_factory`.
        reward: what an agent is trained on.
        settings: how it is trained.
        masks, images: sampled an update, and reward images a mask (None: all).
        reporter: told about every update.
        known: trained agents by layer, which go on instead of a fresh one.
    """

    def __init__(
        self,
        make_policy: PolicyFactory,
        reward: RewardFunction,
        settings: AgentSettings,
        masks: int,
        images: int | None,
        reporter: Reporter,
        known: Mapping[str, SavedAgent] | None = None,
    ) -> None:
        self.make_policy, self.reward, self.settings = make_policy, reward, settings
        self.masks, self.images, self.reporter = masks, images, reporter
        self.known = dict(known or {})

    def __call__(self, layer: LayerTask, working: Path, seed: int) -> Decision:
        """Train on `layer` and decide."""
        policy = self._policy(layer, seed)
        result, decision = train_on_layer(
            layer,
            policy,
            self.reward,
            self.settings,
            masks=self.masks,
            images=self.images,
            seed=seed,
            report=self.reporter.update,
        )
        save_agent(working / AGENT, policy, agent_facts(layer, seed, result))
        return decision

    def _policy(self, layer: LayerTask, seed: int) -> Policy:
        saved = self.known.get(layer.group.name)
        if saved is None:
            n_filters, n_weights = layer.observation.weights.shape
            return call_policy_factory(self.make_policy, n_filters, n_weights, derive_seed(seed, "policy"))
        return trained_further(saved, layer)
