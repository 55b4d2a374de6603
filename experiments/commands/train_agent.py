"""`keepdrop train-agent layer=NAME`: one layer's agent on a checkpoint, nothing cut."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, open_dict

from ...envs.data.objective import display_name
from ...errors import UserError
from ..config.baseline_training import begin_task
from ..config.build import build_reward
from ..config.entry_point import open_run, run_with_hydra, settings
from ..config.ignored import (
    BASE_TRAINING,
    COMPENSATION,
    ONLY_THE_BASE,
    PATIENCE,
    TRAINED_ALREADY,
    Ignored,
    refuse_ignored,
)
from ..config.prepare import Inputs, check_search, prepare
from ..pruning.schedule import Schedule
from ..runs.console import Terminal
from ..runs.folder import METRICS, RunFolder
from ..runs.tracking import Tracker
from ..training.loop import TrainSettings
from .layer_agents import TrainAgents
from .report import keep_report


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("train_agent", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Train one agent; returns what `metrics.json` holds."""
    inputs = check(config)
    folder, config = open_run(config)
    terminal = Terminal(config.quiet)
    metrics = train_layer(inputs, config, folder, terminal)
    base, pruned = (f"{100 * metrics[f'{name}_accuracy']:.2f} %" for name in ("base", "pruned"))
    terminal.console.print(
        f"{metrics['name']}: kept {metrics['n_kept']} of {metrics['n_filters']} ({metrics['decided_by']}), "
        f"{display_name(inputs.splits.objective.name)} {base} -> {pruned} on the reward split",
        markup=False,
    )
    keep_report(folder, terminal)
    terminal.console.print(f"Run folder: {folder.path}", markup=False)
    return metrics


IGNORED = (
    TRAINED_ALREADY,
    ONLY_THE_BASE,
    *BASE_TRAINING,
    COMPENSATION,
    PATIENCE,
    Ignored(
        "policy", "warm_start brings the agent that is trained further.", lambda config: config.warm_start is not None
    ),
)


def check(config: DictConfig) -> Inputs:
    """Find every mistake of the user's before anything is written."""
    refuse_ignored(config, IGNORED)
    settings(config.base, TrainSettings)
    if any(character in config.layer for character in "*?["):
        raise UserError(f"layer is {config.layer!r}, a pattern; expected one name: train several with -m layer=a,b,c.")
    with open_dict(config):
        config.layers = [config.layer]
    inputs = prepare(config)
    check_search(config, inputs)
    return inputs


def train_layer(inputs: Inputs, config: DictConfig, folder: RunFolder, terminal: Terminal) -> dict[str, Any]:
    """Train, verify and save the agent of `layer`."""
    tracker = Tracker(folder / "tensorboard")
    task = begin_task(inputs, config, folder, terminal, tracker)
    reward = build_reward(config.reward)
    schedule = Schedule(TrainAgents(config, reward, terminal, tracker), reward, config.drop_bound, seed=config.seed)
    _, _, (record,) = schedule.run(task, folder, _Silent())
    tracker.close()
    metrics = {
        "name": record.name,
        "n_filters": record.n_filters,
        "n_kept": record.n_kept,
        "decided_by": record.decided_by,
        "base_accuracy": task.base.accuracy,
        "pruned_accuracy": record.pruned_accuracy,
        "within_bound": record.within_bound,
        "search_seconds": record.search_seconds,
        **record.facts,
    }
    folder.write_json(METRICS, metrics)
    return metrics


class _Silent:
    """Watches and says nothing: there is one layer, and the final line tells of it."""

    def layer_begins(self, position: int, total: int, layer: Any) -> None:
        """Nothing."""

    def layer_ends(self, position: int, total: int, record: Any) -> None:
        """Nothing."""
