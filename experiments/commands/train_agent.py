"""`keepdrop train-agent layer=NAME`: one layer's agent on a checkpoint, nothing cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from ...envs.data.objective import display_name
from ...errors import UserError
from ..config.build import build_reward
from ..config.entry_point import run_with_hydra
from ..config.ignored import (
    BASE_TRAINING,
    COMPENSATION,
    ONLY_THE_BASE,
    PATIENCE,
    TRAINED_ALREADY,
    Ignored,
    refuse_ignored,
)
from ..config.prepare import UNTIMED, Inputs, check_search, prepare
from ..config.training import begin_task
from ..pruning.schedule import Schedule
from ..runs.context import RunContext
from ..runs.folder import METRICS
from .prune import train_layer_agents
from .running import carry_out


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("train_agent", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Train one agent; returns what `metrics.json` holds."""
    return carry_out(config, check, train_layer, show)


IGNORED = (
    TRAINED_ALREADY,
    ONLY_THE_BASE,
    *BASE_TRAINING,
    UNTIMED,
    COMPENSATION,
    PATIENCE,
    Ignored(
        "surgery.whole_blocks",
        "an agent of one layer always keeps a filter of it.",
        lambda config: config.surgery.whole_blocks,
    ),
    Ignored(
        "policy", "warm_start brings the agent that is trained further.", lambda config: config.warm_start is not None
    ),
)


def check(config: DictConfig) -> Inputs:
    """Find everything that is wrong with the input before anything is written."""
    refuse_ignored(config, IGNORED)
    if any(character in config.layer for character in "*?["):
        raise UserError(f"layer is {config.layer!r}, a pattern; expected one name: train several with -m layer=a,b,c.")
    inputs = prepare(config, [config.layer])
    check_search(config, inputs)
    return inputs


def train_layer(inputs: Inputs, context: RunContext) -> dict[str, Any]:
    """Train, verify and save the agent of `layer`."""
    config, task = context.config, begin_task(inputs, context)
    reward = build_reward(config.reward)
    schedule = Schedule(train_layer_agents(context, reward), reward, config.drop_bound, seed=config.seed)
    _, _, (record,) = schedule.run(task, context.folder, _Silent())
    metrics = {
        "name": record.name,
        "metric": task.objective.name,
        "n_filters": record.n_filters,
        "n_kept": record.n_kept,
        "decided_by": record.decided_by,
        "base_accuracy": task.base.accuracy,
        "pruned_accuracy": record.pruned_accuracy,
        "within_bound": record.within_bound,
        "search_seconds": record.search_seconds,
        **record.facts,
    }
    context.folder.write_json(METRICS, metrics)
    return metrics


def show(metrics: Mapping[str, Any], context: RunContext) -> None:
    """One line about the layer."""
    base, pruned = (f"{100 * metrics[f'{name}_accuracy']:.2f} %" for name in ("base", "pruned"))
    context.terminal.console.print(
        f"{metrics['name']}: kept {metrics['n_kept']} of {metrics['n_filters']} ({metrics['decided_by']}), "
        f"{display_name(metrics['metric'])} {base} -> {pruned} on the reward split",
        markup=False,
    )


class _Silent:
    """Watches and says nothing: there is one layer, and the final line tells of it."""

    def layer_begins(self, position: int, total: int, layer: Any) -> None:
        """Nothing."""

    def layer_ends(self, position: int, total: int, record: Any) -> None:
        """Nothing."""
