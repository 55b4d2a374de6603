"""`keepdrop prune`: a trained CNN in, a smaller CNN, its agents and a report out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from ...agent.learning.natural_evolution import NetworkTrainer
from ...envs.data.objective import display_name
from ...envs.networks.checkpoint import hash_state
from ...envs.one_shot import GROUP_NAME, OneShotTask
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.surgery.kept_channels import KeptChannels
from ...envs.surgery.macs_target import Target
from ...envs.task import LayerTask, PruningTask
from ..config.baseline_training import begin_task
from ..config.build import build_augment, build_reward
from ..config.entry_point import begin_or_resume, plain, run_with_hydra, settings
from ..config.ignored import (
    BASE_TRAINING,
    COMPENSATION,
    LAYER_EVALUATION,
    PATIENCE,
    REPAIR,
    SEARCH_REPAIR,
    TRAINED_ALREADY,
    Ignored,
    refuse_ignored,
    training,
)
from ..config.prepare import Inputs, check_network_search, check_search, prepare
from ..config.schema import LatencyConfig
from ..deploy.export import check_exports
from ..deploy.runtimes import check_runtimes
from ..pruning.network_decide import TrainNetworkAgent
from ..pruning.network_schedule import NetworkSchedule, show_update
from ..pruning.network_search import NetworkSearchSettings
from ..pruning.recover import Recover, RecoverySettings
from ..pruning.schedule import LayerRecord, Recovery, Schedule, check_order
from ..reporting.curves import write_curves
from ..runs.console import Terminal
from ..runs.folder import RunFolder
from ..runs.provenance import command_line
from ..runs.tracking import Tracker
from ..training.loop import TrainProgress, TrainSettings
from .finish import Networks, finetune, metrics_of, save_result, show_results, write_results
from .layer_agents import TrainAgents, check_controls
from .report import keep_report


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("prune", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Run the whole job, or go on with an interrupted one; returns what `metrics.json` holds."""
    metrics, folder, terminal = begin_or_resume(config, check, prune_network)
    keep_report(folder, terminal)
    show_results(metrics, folder, terminal)
    return metrics


ONE_AGENT = "with target.removed one agent decides on all layers at once (network_search, repair)."
AN_AGENT_A_LAYER = "without target.removed an agent decides on each layer (agent, search, reward, policy)."
IGNORED = (
    TRAINED_ALREADY,
    *BASE_TRAINING,
    Ignored("order reward policy agent search warm_start", ONE_AGENT, lambda config: config.target.removed is not None),
    Ignored(LAYER_EVALUATION, ONE_AGENT, lambda config: config.target.removed is not None),
    Ignored("target.of network_search repair", AN_AGENT_A_LAYER, lambda config: config.target.removed is None),
    COMPENSATION,
    REPAIR,
    SEARCH_REPAIR,
    PATIENCE,
    *training("recovery.train"),
    *training("finetune"),
)


def check(config: DictConfig) -> Inputs:
    """Find every mistake of the user's before anything is written."""
    refuse_ignored(config, IGNORED)
    for node in (config.finetune, config.base):
        settings(node, TrainSettings)
    settings(config.recovery, RecoverySettings)
    settings(config.latency, LatencyConfig)
    check_exports(config.export)
    check_order(config.order)
    check_controls(config.controls)
    inputs = prepare(config)
    check_runtimes(config.latency.runtimes, inputs.device)
    if config.target.removed is None:
        check_search(config, inputs)
    else:
        check_network_search(config, inputs)
    return inputs


def prune_network(inputs: Inputs, config: DictConfig, folder: RunFolder, terminal: Terminal) -> dict[str, Any]:
    """Base, schedule, fine-tuning, report; every finished part is found again by a resumed run."""
    tracker = Tracker(folder / "tensorboard")
    task = begin_task(inputs, config, folder, terminal, tracker)
    dense = task.model
    base, n_images = f"Base {display_name(task.objective.name)}", len(inputs.splits.reward)
    terminal.say(f"{base} on {n_images} reward images: {100 * task.base.accuracy:.2f} %")
    pruned_task, kept, records = run_schedule(task, config, folder, terminal, tracker)
    one_shot = None if config.target.removed is None else OneShotTask(task, build_repair(config))
    write_curves(task, records, folder, terminal, config.controls, config.seed, one_shot)
    pruned = pruned_task.model
    finetuned, seconds = finetune(dense, pruned, inputs.splits, config, folder, terminal, tracker)
    networks = Networks(dense, pruned, finetuned)
    metrics = metrics_of(networks, inputs.splits, records, config, seconds)
    facts = {"base_sha256": hash_state(dense)}
    metrics |= save_result(networks, kept, inputs.splits, config, folder, facts)
    tracker.kept_filters({record.name: record.keep for record in records}, len(records))
    tracker.hparams(plain(config), metrics)
    tracker.close()
    write_results(metrics, folder)
    return metrics


def run_schedule(
    task: PruningTask, config: DictConfig, folder: RunFolder, terminal: Terminal, tracker: Tracker
) -> tuple[PruningTask, KeptChannels, list[LayerRecord]]:
    """Layer by layer within a drop bound, or all layers at once at a MACs target."""
    log = ScheduleLog(terminal, tracker, task.objective.name)
    if config.target.removed is None:
        with terminal.progress("layers", len(task.groups)):
            return build_schedule(task.model, config, terminal, tracker).run(task, folder, log)
    search = settings(config.network_search, NetworkSearchSettings)

    def report(trainer: NetworkTrainer, metrics: Mapping[str, float]) -> None:
        terminal.advance(len(trainer.history), show_update(trainer, metrics))
        tracker.scalars(f"agent/{GROUP_NAME}", metrics, len(trainer.history))

    repair, recovery = build_repair(config), build_recovery(task.model, config, terminal)
    target, facts = Target(**plain(config.target)), {"command": command_line(), "config": plain(config)}
    decide = TrainNetworkAgent(search, target, report, facts)
    with terminal.progress("updates", search.agent.updates):
        return NetworkSchedule(decide, repair, config.drop_bound, config.seed, recovery).run(task, folder, log)


def build_repair(config: DictConfig) -> ReconstructionSettings | None:
    """How a network is repaired that is cut in all layers at once; None leaves it as cut."""
    return settings(config.repair, ReconstructionSettings) if config.evaluation.compensate else None


def build_schedule(dense: nn.Module, config: DictConfig, terminal: Terminal, tracker: Tracker) -> Schedule:
    """The schedule of agents that are trained layer by layer."""
    reward = build_reward(config.reward)
    return Schedule(
        decide=TrainAgents(config, reward, terminal, tracker),
        reward=reward,
        drop_bound=config.drop_bound,
        recover=build_recovery(dense, config, terminal),
        order=config.order,
        seed=config.seed,
    )


def build_recovery(dense: nn.Module, config: DictConfig, terminal: Terminal) -> Recovery:
    """What follows every cut, with a bar of its own."""
    chosen, augment = settings(config.recovery, RecoverySettings), build_augment(config.augment)

    def shown(task: PruningTask, seed: int, working: Path) -> nn.Module:
        metric = display_name(task.objective.name)

        def report(progress: TrainProgress) -> None:
            terminal.advance(progress.epoch, f"loss {progress.loss:.3f}, {metric} {100 * progress.accuracy:.1f} %")

        with terminal.progress("recovery", chosen.train.epochs):
            return Recover(chosen, dense, augment, report)(task, seed, working)

    return shown


class ScheduleLog:
    """Says and logs what happens to each layer; `metric` is the metric's name."""

    def __init__(self, terminal: Terminal, tracker: Tracker, metric: str) -> None:
        self.terminal = terminal
        self.tracker = tracker
        self.metric = display_name(metric)

    def layer_begins(self, position: int, total: int, layer: LayerTask) -> None:
        """The bar of the layers; the decider shows its own progress below it."""
        self.terminal.advance(position, f"{position + 1} of {total}: {layer.group.name}")

    def layer_ends(self, position: int, total: int, record: LayerRecord) -> None:
        """One line and the layer's scalars."""
        self.terminal.advance(position + 1)
        self.terminal.say(
            f"[{position + 1}/{total}] {record.name}: kept {record.n_kept} of {record.n_filters} "
            f"({record.decided_by}), {self.metric} {100 * record.pruned_accuracy:.2f} %, "
            f"recovered {100 * record.recovered_accuracy:.2f} %, "
            f"{record.search_seconds + record.recovery_seconds:.0f} s"
        )
        self.tracker.scalars(
            "schedule",
            {
                "kept_fraction": record.n_kept / record.n_filters,
                "pruned_accuracy": record.pruned_accuracy,
                "recovered_accuracy": record.recovered_accuracy,
            },
            position,
        )
