"""Agents that were trained before: found in a run folder, checked against a layer, and only asked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...agent.policies.policy import Policy
from ...agent.saved_agent import SavedAgent, check_agent, load_agent
from ...envs.one_shot import GROUP_NAME
from ...envs.task import LayerTask, PruningTask
from ...errors import UserError
from .agent_card import ANY_NETWORK
from .agent_places import agent_folders, naming
from .decide import Decision, observation_tensors
from .network_decide import check_network_fit
from .pretrained import check_reads_networks
from .search import fit_facts


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


def check_fit(agent: SavedAgent, layer: LayerTask) -> None:
    """Refuse an agent of another layer or another observation format with an `AgentMismatch`."""
    expected = fit_facts(layer)
    # In a chain of pruned layers D shrinks with the layers before: only a policy that is tied to it must agree.
    tied = {"n_filters", "n_weights"} & set(agent.facts["policy"]["kwargs"])
    check_agent(agent, **{name: expected[name] for name in ("group", "statistic_names", *sorted(tied))})


def check_agents(agents: Mapping[str, SavedAgent], task: PruningTask) -> None:
    """Refuse agents, by layer or of the whole network, that do not fit a task with an `AgentMismatch`."""
    for name, agent in agents.items():
        if name == ANY_NETWORK:
            check_reads_networks(agent)
        elif name == GROUP_NAME:
            check_network_fit(agent, task)
        else:
            check_fit(agent, task.layer(name))


def agents_of(
    known: Mapping[str, SavedAgent], layers: Iterable[str], run: str | Path, leave_out: str
) -> dict[str, SavedAgent]:
    """Those of `known` that are called as `layers` are; `UserError` where a run has agents, but none of these.

    `leave_out` is what its sentence says to leave out instead.
    """
    wanted = list(layers)
    mine = {name: agent for name, agent in known.items() if name in wanted}
    if known and not mine:
        raise UserError(
            f"The agents in {str(run)!r} were trained for {', '.join(known)}, but the layers are {', '.join(wanted)}; "
            f"choose a matching run or leave {leave_out} out."
        )
    return mine


def trained_further(saved: SavedAgent, layer: LayerTask) -> Policy:
    """A copy of a saved agent's policy, ready to go on learning; `AgentMismatch` where it does not fit the layer."""
    check_fit(saved, layer)
    module: Any = copy.deepcopy(saved.policy)
    return module.train()


def load_agents(run: str | Path, policies: Mapping[str, Callable[..., Policy]] | None = None) -> dict[str, SavedAgent]:
    """All agents of a run (of `prune`, `train-agent`, `pretrain`, or a sweep), by layer, in the order of the run.

    Args:
        run: the folder, or another place of one agent (`agent_places`).
        policies: classes of one's own that agents were made of, by name.
    """
    with naming(run):
        found = [load_agent(each, policies) for each in agent_folders(run)]
    return {str(agent.facts.get("group")): agent for agent in found}
