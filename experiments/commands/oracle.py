"""`keepdrop oracle`: each filter removed alone, and how well criteria and trained agents foresee what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ...agent.criteria import CRITERIA, normalised, scores
from ...agent.policies.network import NetworkPolicy
from ...agent.saved_agent import SavedAgent
from ...envs.observation import STATISTIC_NAMES
from ...envs.one_shot import GROUP_NAME, OneShotTask
from ...envs.task import PruningTask
from ...errors import UserError
from ..config.cli_errors import nearest
from ..config.entry_point import plain, run_with_hydra
from ..config.ignored import BASE_TRAINING, ONLY_THE_BASE, TRAINED_ALREADY, Ignored, refuse_ignored
from ..config.prepare import Inputs, prepare
from ..config.training import begin_task
from ..oracle.correlations import AGENT, NETWORK_AGENT, correlation_rows, show, write_all
from ..oracle.single_removals import filter_oracle
from ..pruning.decide import observation_tensors
from ..pruning.network_decide import check_network_fit
from ..pruning.trained_agents import agents_of, check_agents, check_fit, load_agents
from ..runs.console import Terminal
from ..runs.context import RunContext
from ..runs.folder import RunFolder, file_name
from ..runs.seeds import derive_seed
from .running import carry_out


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("oracle", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Measure, or resume a measurement; returns what `metrics.json` holds."""
    return carry_out(config, check, oracle, lambda metrics, context: show(metrics, context.terminal))


IGNORED = (
    TRAINED_ALREADY,
    ONLY_THE_BASE,
    *BASE_TRAINING,
    Ignored(
        "evaluation.compensate evaluation.target evaluation.ridge evaluation.compensation_images evaluation.cache_gib "
        "evaluation.dtype evaluation.compile evaluation.memory",
        "filters are removed one at a time, uncompensated and in float32; evaluation.method and "
        "evaluation.statistics_images count here.",
    ),
    Ignored(
        "random_seeds",
        "criteria does not name random.",
        lambda config: not any(fnmatchcase("random", pattern) for pattern in config.criteria),
    ),
)


def check(config: DictConfig) -> Inputs:
    """Find everything that is wrong with the input before anything is written."""
    refuse_ignored(config, IGNORED)
    for pattern in config.criteria:
        if not any(fnmatchcase(name, pattern) for name in CRITERIA):
            hint = nearest(pattern, CRITERIA) or f"expected names or globs of {', '.join(CRITERIA)}."
            raise UserError(f"criteria has {pattern!r}, which names none; {hint}")
    if not config.criteria and config.agents is None:
        raise UserError("There is nothing to compare the oracle with; give criteria or agents.")
    known = load_agents(config.agents) if config.agents is not None else {}
    inputs = prepare(config, plain(config.layers))
    check_layers(known, inputs, config)
    return inputs


def check_layers(known: Mapping[str, SavedAgent], inputs: Inputs, config: DictConfig) -> None:
    """UserError for agents of other layers, or of other observations."""
    # An agent of the whole network is called as no layer is, so it is named only where it is there.
    whole = [GROUP_NAME] if GROUP_NAME in known else []
    mine = agents_of(known, [*whole, *(group.name for group in inputs.groups)], config.agents, "agents")
    if mine and inputs.dense is not None:
        check_agents(mine, inputs.task(inputs.dense))


def network_scores(agent: SavedAgent, task: PruningTask) -> dict[str, Tensor]:
    """An agent of all layers: its scores (N,) by layer, comparable between layers."""
    check_network_fit(agent, task)
    one_shot, policy = OneShotTask(task, None), agent.policy
    assert isinstance(policy, NetworkPolicy)
    return one_shot.named(policy.scores(policy.features(observation_tensors(one_shot))))


def oracle(inputs: Inputs, context: RunContext) -> dict[str, Any]:
    """Base, every layer's oracle and scores, correlations; finished layers are found again by a resumed run."""
    config, folder, terminal = context.config, context.folder, context.terminal
    task = begin_task(inputs, context)
    agents = load_agents(config.agents) if config.agents is not None else {}
    everywhere = network_scores(agents[GROUP_NAME], task) if GROUP_NAME in agents else {}
    total = sum(group.n_filters for group in task.groups)
    layers, done = {}, 0
    with terminal.progress("filters", total) as bar:
        for group in task.groups:
            layers[group.name] = layer_facts(task, group.name, agents, everywhere, config, folder, bar, done)
            done += group.n_filters
            if not terminal.console.is_terminal:
                terminal.say(f"{group.name}: {group.n_filters} filters removed, one at a time")
    metrics = {
        "base_accuracy": task.base.accuracy,
        "n_images": len(task.splits.reward),
        "layers": layers,
        "correlations": correlation_rows(layers),
    }
    write_all(metrics, folder)
    return metrics


def layer_facts(
    task: PruningTask,
    name: str,
    agents: Mapping[str, SavedAgent],
    everywhere: Mapping[str, Tensor],
    config: DictConfig,
    folder: RunFolder,
    bar: Terminal,
    done: int,
) -> dict[str, Any]:
    """One layer's oracle and every method's scores, filter by filter; kept in `layers/NAME.json`."""
    file = f"layers/{file_name(name)}.json"
    known = folder.read_json(file)
    if known is not None:
        return dict(known)
    layer = task.layer(name)

    def show_progress(images: int, of: int) -> None:
        bar.advance(done + layer.n_filters * images / of, name)

    images, labels = task.reward_images
    how: dict[str, Any] = {"objective": task.objective, "method": task.settings.method, "progress": show_progress}
    found = filter_oracle(task.model, layer.group, images, labels, **how)
    seen = observation_tensors(layer)
    given = layer_scores(name, seen, config)
    if name in agents:
        check_fit(agents[name], layer)
        with torch.no_grad():
            given[AGENT] = agents[name].policy(seen).keep_probability().double()
    if name in everywhere:
        given[NETWORK_AGENT] = everywhere[name]
    facts = {
        "loss_change": found.loss_change.tolist(),
        "accuracy_change": found.accuracy_change.tolist(),
        "scores": {each: value.tolist() for each, value in given.items()},
    }
    folder.write_json(file, facts)
    return facts


def layer_scores(layer: str, seen: Mapping[str, Tensor], config: DictConfig) -> dict[str, Tensor]:
    """Scores (N,) of every chosen criterion, l2-normalised in the layer; random once a seed, as random-0 and so on."""
    found = {}
    for name in (each for each in CRITERIA if any(fnmatchcase(each, pattern) for pattern in config.criteria)):
        for number in range(config.random_seeds if name == "random" else 1):
            seed = derive_seed(config.seed, "oracle", layer, str(number))
            generator = torch.Generator().manual_seed(seed)
            key = f"random-{number}" if name == "random" else name
            found[key] = normalised(scores(seen, STATISTIC_NAMES, name, generator), name)
    return found
