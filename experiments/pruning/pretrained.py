"""Pretrained agents: one that was trained over other networks reads this one and decides, without any search.

Shapes: L groups, N filters of all groups together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...agent.policies.group_policy import GroupPolicy
from ...agent.saved_agent import AgentMismatch, SavedAgent, check_agent, load_agent
from ...envs.described_task import DescribedTask
from ...envs.group_descriptions import DESCRIPTION_NAMES
from ...envs.observation import STATISTIC_NAMES
from ...envs.one_shot import OneShotTask
from ...envs.repair.reconstruction_error import RECONSTRUCTION
from ...envs.surgery.targets import Target
from ...errors import UserError
from .agent_places import PRETRAINED, agent_folders, is_place, naming
from .decide import observation_tensors

WORDS = "expected 'pretrained', or the folder, URL or hf://OWNER/NAME of an agent that keepdrop pretrain trained."


def load_pretrained(where: str | Path | SavedAgent) -> SavedAgent:
    """An agent that reads networks: keepdrop's own ("pretrained"), or that of a folder, run, or repository (hf://...).

    Raises UserError where there is none, or one that was trained for one architecture.
    """
    if isinstance(where, SavedAgent):
        check_reads_networks(where)
        return where
    if not is_place(where):
        raise UserError(f"agents is {str(where)!r}; {WORDS}")
    with naming(where):
        agent = load_agent(agent_folders(where)[0])
        check_reads_networks(agent)
    return agent


def check_reads_networks(agent: SavedAgent) -> None:
    """Refuse an agent of one architecture, or one that reads other rows, with an `AgentMismatch`."""
    if not isinstance(agent.policy, GroupPolicy):
        raise AgentMismatch(
            f"the agent in {agent.folder} was trained for one architecture, but is to decide on any; ask it with "
            f"keepdrop apply or keepdrop.apply_agents, or give agents={PRETRAINED}"
        )
    check_agent(agent, description_names=DESCRIPTION_NAMES, statistic_names=STATISTIC_NAMES)


def needs_target(example: str) -> UserError:
    """What to say where an agent that reads networks is asked without a target."""
    return UserError(f"An agent that reads networks decides at a target, and none is given; add one, as in {example}.")


def described(one_shot: OneShotTask, target: Target) -> DescribedTask:
    """A network at a target, as such an agent sees it; what was seen of the layers is shared."""
    return DescribedTask(one_shot.task, target, one_shot.repair, one_shot.layers)


def pretrained_choices(agent: SavedAgent, seen: DescribedTask) -> dict[str, Tensor]:
    """What is worth judging before an agent that reads networks decides: scores of all filters (N,), by name.

    What `corrected` says, the plan that it corrects, and equal shares in the order of l2.
    """
    found = corrected(agent.policy, observation_tensors(seen))
    if seen.reconstruction_ranking is not None:
        found[RECONSTRUCTION] = seen.joined(seen.reconstruction_ranking)
    return {**found, "uniform l2": seen.joined(seen.even)}


def corrected(policy: GroupPolicy, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An agent's choice, the same correction half way, and its order of filters alone: scores (N,) by name.

    The correction was learned in other networks, and may go too far in this one.
    """
    with torch.no_grad():
        rows = observation["descriptions"]
        whole, plan = policy.action(rows), policy.plan(len(rows))
        order = torch.cat([plan[: len(rows)], whole[len(rows) : -1], plan[-1:]])
        actions = {"": whole, ", half way": (whole + plan) / 2, ", order alone": order}
        scores = policy.scores_of(observation, list(actions.values()))
        return {f"pretrained agent{name}": each for name, each in zip(actions, scores, strict=True)}


def pretrained_scores(agent: SavedAgent, seen: DescribedTask) -> tuple[Tensor, Tensor]:
    """What the agent makes of a network at a target: scores of all filters (N,) and log weights of the groups (L,)."""
    observation = observation_tensors(seen)
    with torch.no_grad():
        return agent.policy.scores(observation), agent.policy.log_weights(observation["descriptions"])
