"""Agents as deciders: trained on the layer in front of them, or trained before and only asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ..agent.criteria import CRITERIA
from ..agent.saved_agent import WEIGHTS, AgentMismatch, SavedAgent, check_agent, load_agent, save_agent
from ..agent.trainer import AgentSettings, Trainer
from ..envs.adaptive import AdaptiveSettings
from ..envs.task import LayerTask
from ..rewards.errors import UserError
from ..rewards.outcome import RewardFunction
from .build import build_policy
from .console import Terminal
from .decide import AGENT, Decision, observation_tensors
from .doors import plain, settings
from .facts import command_line
from .run_folder import RunFolder
from .search import agent_facts, fit_facts, train_on_layer
from .seeds import derive_seed
from .tracking import Tracker


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
                adaptive=AdaptiveSettings() if search.adaptive else None,
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
        check_fit(saved, layer)
        module: Any = saved.policy
        return module.train()

    def _report(self, layer: LayerTask, bar: Terminal, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        name, step = layer.group.name, len(trainer.history)
        kept, drop = metrics.get("info/kept_fraction", 0.0), metrics.get("info/accuracy_drop", 0.0)
        bar.advance(
            step,
            f"update {step} of {self.settings.updates}, reward {metrics['reward_mean']:+.3f}, kept {kept:.0%}, "
            f"accuracy drop {100 * drop:.1f} points",
        )
        self.tracker.scalars(f"agent/{name}", metrics, step)
        with torch.no_grad():
            probability_N = trainer.policy(observation_tensors(layer)).keep_probability()
        self.tracker.histogram(f"agent/{name}/keep_probability", probability_N, step)


class AskAgents:
    """Asks trained agents, without training them.

    Args:
        agents: by layer name.
    """

    def __init__(self, agents: Mapping[str, SavedAgent]) -> None:
        self.agents = agents

    def __call__(self, layer: LayerTask, working: Path, seed: int) -> Decision:
        """The layer's own agent's greedy mask."""
        agent = self.agents[layer.group.name]
        check_fit(agent, layer)
        with torch.no_grad():
            keep = agent.policy(observation_tensors(layer)).greedy()
        return Decision(keep, "trained agent")


def check_controls(names: Sequence[str]) -> None:
    """Refuse a control that is no criterion."""
    unknown = [name for name in names if name not in CRITERIA]
    if unknown:
        raise UserError(f"controls has {unknown[0]!r}; expected any of {', '.join(CRITERIA)}.")


def check_fit(agent: SavedAgent, layer: LayerTask) -> None:
    """Refuse an agent of another layer or another observation format with an `AgentMismatch`."""
    expected = fit_facts(layer)
    # In a chain of pruned layers D shrinks with the layers before: only a policy that is tied to it must agree.
    tied = {"n_filters", "n_weights"} & set(agent.facts["policy"]["kwargs"])
    check_agent(agent, **{name: expected[name] for name in ("group", "statistic_names", *sorted(tied))})


def load_agents(run: str) -> dict[str, SavedAgent]:
    """All agents below a run folder (of `prune`, `train-agent`, or a sweep), by layer, in the order of the run."""
    path = Path(run)
    if not path.is_dir():
        raise UserError(f"{run!r} is not a folder; expected a run folder of keepdrop prune or train-agent.")
    folders = [facts.parent for facts in sorted(path.glob(f"**/{AGENT}/{WEIGHTS}")) if ".partial" not in str(facts)]
    agents = {str(agent.facts.get("group")): agent for agent in map(load_agent, folders)}
    if not agents:
        raise UserError(
            f"No trained agent in {run!r}; expected a run folder of keepdrop prune or train-agent: look for one "
            f"with layers/*/{AGENT}."
        )
    return agents


def agents_config(run: str) -> DictConfig:
    """The configuration of the run in which agents were trained (of the first job, in a sweep)."""
    path = Path(run)
    for folder in (path, *sorted(path.glob("*/"))):
        if (folder / "config.yaml").is_file():
            return RunFolder.open(folder).config()
    raise AgentMismatch(f"{run!r} has agents but no config.yaml; expected the whole run folder: copy it again.")
