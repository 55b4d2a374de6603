"""Who decides on all layers at once: an agent being trained, a trained one that is only asked, or a criterion."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ...agent.policies.network import NetworkPolicy
from ...agent.saved_agent import SavedAgent, check_agent, save_agent
from ...envs.networks.checkpoint import hash_state
from ...envs.observation import STATISTIC_NAMES
from ...envs.one_shot import GROUP_NAME, OneShotTask
from ...envs.surgery.targets import Target
from ...envs.task import PruningTask
from ..engines.engine import Engine
from ..engines.local_processes import LocalEngine
from ..engines.spread_task import spread_over
from ..runs.seeds import derive_seed
from .decide import AGENT, AskCriterion, observation_tensors
from .halving import Training
from .network_search import NetworkAgent, NetworkSearchSettings, Report, best_of, projection
from .pretrained import described, pretrained_choices


@dataclass(frozen=True)
class NetworkDecision:
    """Masks (N,) bool by group name, who decided, and JSON-able facts about the search."""

    masks: Mapping[str, Tensor]
    source: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class NetworkDecider(Protocol):
    """Decides on a whole network; may write into the working folder, and keeps a long training in `state`."""

    def __call__(self, one_shot: OneShotTask, working: Path, state: Path, seed: int) -> NetworkDecision:
        """Return the decision for all groups of `evaluation`, which judges the final cut."""
        ...


class TrainNetworkAgent:
    """Trains a fresh agent on the whole network and saves it.

    Args:
        settings: of the search.
        target: the MACs to remove.
        report: told about every update.
        facts: saved with the agent (command, configuration).
        training: of the search's best masks, where `settings.halving` wants that.
        engine: judges the masks.
    """

    def __init__(
        self,
        settings: NetworkSearchSettings,
        target: Target,
        report: Report | None = None,
        facts: Mapping[str, Any] | None = None,
        training: Training | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.settings, self.target, self.training = settings, target, training
        self.engine = engine or LocalEngine()
        self.report, self.facts = report, dict(facts or {})

    def __call__(self, one_shot: OneShotTask, working: Path, state: Path, seed: int) -> NetworkDecision:
        """Train, save, decide."""
        task = one_shot.task
        with spread_over(self.engine, one_shot) as judged:
            agent = NetworkAgent(self.settings, judged, self.report, state, self.training)
            masks = agent.choose(self.target, seed)
        assert agent.policy is not None
        facts = {**fit_facts(task), "target": self.target.facts(), "seed": seed, **agent.facts}
        known = {
            "base_hash": hash_state(task.model),
            "base_accuracy": task.base.accuracy,
            "reward_split_hash": task.splits.hashes["reward"],
        }
        save_agent(working / AGENT, agent.policy, {**self.facts, **facts, **known})
        short = {key: value for key, value in agent.facts.items() if key != "reward_curve"}
        short["target"] = task.reached(self.target, masks)
        return NetworkDecision(masks, str(agent.facts["decided_by"]), short)


class AskNetworkAgent:
    """Asks a trained agent, without training it, at the MACs target it was trained for or another one.

    Args:
        agent: of a network with the same groups.
        target: the MACs to remove; None takes the agent's own.
    """

    def __init__(self, agent: SavedAgent, target: Target | None = None) -> None:
        self.agent = agent
        self.target = target or Target(**agent.facts["target"])

    def __call__(self, one_shot: OneShotTask, working: Path, state: Path, seed: int) -> NetworkDecision:
        """The mask of the mean policy."""
        check_network_fit(self.agent, one_shot.task)
        policy = self.agent.policy
        assert isinstance(policy, NetworkPolicy)
        keep = projection(one_shot, self.target)(policy.scores(policy.features(observation_tensors(one_shot))))
        masks = one_shot.named(keep)
        return NetworkDecision(masks, "trained agent", {"target": one_shot.task.reached(self.target, masks)})


class AskPretrainedAgent:
    """Asks an agent that reads networks, without training it.

    A few masks (`pretrained_choices`) are judged on the whole reward split, and nothing is searched.

    Args:
        agent: as loaded by `load_pretrained`.
        target: what the pruned network may cost.
    """

    def __init__(self, agent: SavedAgent, target: Target) -> None:
        self.agent, self.target = agent, target

    def __call__(self, one_shot: OneShotTask, working: Path, state: Path, seed: int) -> NetworkDecision:
        """The best of the agent's masks and its controls; the agent is kept with the decision."""
        started = time.perf_counter()
        seen, project = described(one_shot, self.target), projection(one_shot, self.target)
        choices = pretrained_choices(self.agent, seen)
        candidates = [project(scores) for scores in choices.values()]
        best, accuracies = best_of(one_shot, candidates)
        masks, source = one_shot.named(candidates[best]), list(choices)[best]
        seconds = round(time.perf_counter() - started, 1)
        facts = {key: value for key, value in self.agent.facts.items() if key not in ("format_version", "policy")}
        save_agent(working / AGENT, self.agent.policy, facts)
        told = {
            "mask_evaluations": len(candidates),
            "decision_seconds": seconds,
            "decided_by": source,
            "judged_accuracy": accuracies[best],
            "control_accuracy": dict(list(zip(choices, accuracies, strict=True))[1:]),
            "greedy_accuracy": accuracies[0],
        }
        return NetworkDecision(masks, source, {**told, "target": one_shot.task.reached(self.target, masks)})


class AskNetworkCriterion:
    """Asks a criterion layer by layer, at given counts: the control beside an agent.

    Args:
        criterion: one of `CONTROLS`, as for `AskCriterion`.
        counts: filters to keep, by layer name.
    """

    def __init__(self, criterion: str, counts: Mapping[str, int]) -> None:
        self.criterion, self.counts = criterion, counts

    def __call__(self, one_shot: OneShotTask, working: Path, state: Path, seed: int) -> NetworkDecision:
        """The criterion's masks."""
        ask = AskCriterion(self.criterion, self.counts)
        masks = {}
        for layer in one_shot.layers:
            name = layer.group.name
            masks[name] = ask(layer, working, derive_seed(seed, name)).keep
        return NetworkDecision(masks, self.criterion)


def fit_facts(task: PruningTask) -> dict[str, Any]:
    """What an agent of a network was trained for, as far as it decides whether it can be used on another one."""
    return {
        "group": GROUP_NAME,
        "groups": [group.name for group in task.groups],
        "widths": [group.n_filters for group in task.groups],
        "statistic_names": list(STATISTIC_NAMES),
    }


def check_network_fit(agent: SavedAgent, task: PruningTask) -> None:
    """Refuse an agent of other layers with an `AgentMismatch`; other widths of the same layers are fine."""
    expected = fit_facts(task)
    check_agent(agent, **{name: expected[name] for name in ("group", "groups", "statistic_names")})
