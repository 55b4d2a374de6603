"""Agents as deciders, trained on the layer in front of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ...agent.criteria import CRITERIA
from ...agent.learning.trainer import AgentSettings, Trainer
from ...agent.saved_agent import save_agent
from ...envs.task import LayerTask
from ...errors import UserError
from ...rewards.outcome import RewardFunction
from ..config.build import build_policy
from ..config.entry_point import plain, settings
from ..pruning.decide import AGENT, Decision, observation_tensors
from ..pruning.search import agent_facts, train_on_layer
from ..pruning.trained_agents import load_agents, trained_further
from ..runs.console import Terminal
from ..runs.provenance import command_line
from ..runs.seeds import derive_seed
from ..runs.tracking import Tracker


class TrainAgents:
    """Trains a fresh agent (or a saved one further) on each layer, and saves it in the layer's folder.

    Args:
        config: root configuration with `policy`, `agent`, `search`, `seed` and `warm_start`.
        reward: what the agent is trained on.
        terminal: shows progress.
        tracker: gets a scalar for every metric of every update.
    """

    def __init__(self, config: DictConfig, reward: RewardFunction, terminal: Terminal, tracker: Tracker) -> None:
        self.config = config
        self.reward = reward
        self.terminal = terminal
        self.tracker = tracker
        self.settings = settings(config.agent, AgentSettings)
        self.known = load_agents(config.warm_start) if config.warm_start is not None else {}

    def __call__(self, layer: LayerTask, working: Path, seed: int) -> Decision:
        """Train, save, and decide greedily; the best sampled masks are the alternatives."""
        policy = self._policy(layer, seed)
        search = self.config.search
        with self.terminal.progress(layer.group.name, self.settings.updates) as bar:
            result, decision = train_on_layer(
                layer,
                policy,
                self.reward,
                self.settings,
                masks=search.masks,
                images=search.images,
                seed=seed,
                report=partial(self._report, layer, bar),
            )
        facts = {"command": command_line(), "config": plain(self.config), **agent_facts(layer, seed, result)}
        save_agent(working / AGENT, policy, facts)
        return decision

    def _policy(self, layer: LayerTask, seed: int) -> Any:
        saved = self.known.get(layer.group.name)
        if saved is None:
            return build_policy(self.config.policy, layer, derive_seed(seed, "policy"))
        return trained_further(saved, layer)

    def _report(self, layer: LayerTask, bar: Terminal, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        name, step = layer.group.name, len(trainer.history)
        kept, drop = metrics.get("info/kept_fraction", 0.0), metrics.get("info/accuracy_drop", 0.0)
        bar.advance(
            step,
            f"update {step} of {self.settings.updates}, reward {metrics['reward_mean']:+.3f}, kept {kept:.0%}, "
            f"{100 * drop:.1f} points lost",
        )
        self.tracker.scalars(f"agent/{name}", metrics, step)
        with torch.no_grad():
            probability_N = trainer.policy(observation_tensors(layer)).keep_probability()
        self.tracker.histogram(f"agent/{name}/keep_probability", probability_N, step)


def check_controls(names: Sequence[str]) -> None:
    """Refuse a control that is no criterion."""
    unknown = [name for name in names if name not in CRITERIA]
    if unknown:
        raise UserError(f"controls has {unknown[0]!r}; expected any of {', '.join(CRITERIA)}.")
