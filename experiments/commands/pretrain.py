"""`keepdrop pretrain zoo=FILE`: one agent trained over many networks and targets, to be asked about any other."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from ...envs.groups.finding import find_groups
from ...envs.surgery.filter_group import select_groups
from ...envs.task import measure_baseline
from ...errors import UserError
from ..config.build import build_engine
from ..config.entry_point import allowed_modules, plain, run_path, run_with_hydra, settings
from ..config.ignored import PROCESSES, refuse_ignored
from ..config.schema import PretrainingConfig, SplitConfig
from ..pretraining.rounds import AGENTS, Pretraining, gains_of
from ..pretraining.zoo import ZooNetwork, read_zoo
from ..pruning.decide import AGENT
from ..pruning.input_checks import try_network
from ..runs.context import RunContext
from ..runs.folder import METRICS
from .running import carry_out


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("pretrain", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Train, or resume; returns what `metrics.json` holds."""
    return carry_out(config, check, pretrain, show)


def check(config: DictConfig) -> list[ZooNetwork]:
    """The networks to train on; everything that is wrong with them is found before anything is written."""
    refuse_ignored(config, [PROCESSES])
    networks = read_zoo(config.zoo, allowed_modules(config))
    families = {each.family for each in networks}
    if odd := sorted(set(plain(config.leave_out)) - families):
        raise UserError(f"leave_out names {odd[0]!r}; expected families of the zoo: {', '.join(sorted(families))}.")
    left = [each for each in networks if each.family not in plain(config.leave_out)]
    if not left:
        raise UserError("leave_out names every family of the zoo; leave one in to train on.")
    settings(config.training, PretrainingConfig)
    for network in left:
        try:
            splits = network.splits(settings(config.split, SplitConfig), fit_images=1)
            model = network.load()
            try_network(model, splits)
            measure_baseline(model, splits)
            select_groups(find_groups(model, splits.example), None)
        except UserError as error:
            raise UserError(f"The network {network.name!r} of the zoo cannot be used: {error}") from error
    build_engine(config).check(run_path(config))
    return left


def pretrain(networks: list[ZooNetwork], context: RunContext) -> dict[str, Any]:
    """Sample and learn, round by round; what is finished is found again by a resumed run."""
    config, folder, terminal = context.config, context.folder, context.terminal
    chosen = settings(config.training, PretrainingConfig)
    training = Pretraining(
        networks, settings(config.split, SplitConfig), chosen, folder.path, config.seed, build_engine(config)
    )
    with terminal.progress("trying", chosen.rounds * len(networks)) as bar:
        finished = 0

        def show_network(name: str, done: int, total: int) -> None:
            nonlocal finished
            bar.advance(finished + done, name)
            finished += total if done == total else 0

        training.run(show_network)
    last = folder / AGENTS / str(chosen.rounds)
    shutil.copytree(last, folder / AGENT, dirs_exist_ok=True)
    gains = [gains_of(training.records(number)) for number in range(chosen.rounds)]
    metrics = {
        "networks": {each.name: each.family for each in networks},
        "worlds": len(training.records(0)),
        "mask_evaluations": sum(each["masks"] for each in gains),
        "gain_over_uniform": gains,
    }
    folder.write_json(METRICS, metrics)
    return metrics


def show(metrics: Mapping[str, Any], context: RunContext) -> None:
    """Where the policy stood at the beginning of each round, and where its agent is."""
    for number, gain in enumerate(metrics["gain_over_uniform"]):
        context.terminal.say(
            f"Round {number + 1}: over equal shares the policy gains {100 * gain['policy']:+.1f} points of accuracy, "
            f"the plan {100 * gain['plan']:+.1f} ({gain['masks']} masks)"
        )
    context.terminal.say(f"Agent: {context.folder / AGENT} (keepdrop prune agents=...)")
