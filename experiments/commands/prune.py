"""`keepdrop prune`: a trained CNN in, a smaller CNN, its agents and a report out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ...agent.learning.natural_evolution import NetworkTrainer
from ...agent.learning.trainer import AgentSettings, Trainer
from ...envs.data.objective import display_name
from ...envs.one_shot import GROUP_NAME, OneShotTask
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.surgery.kept_channels import KeptChannels
from ...envs.task import LayerTask, PruningTask
from ...rewards.outcome import RewardFunction
from ..config.build import build_augment, build_engine, build_policy_factory, build_reward, build_target
from ..config.entry_point import plain, run_with_hydra, settings
from ..config.ignored import (
    BASE_TRAINING,
    COMPENSATION,
    HALVING,
    LAYER_EVALUATION,
    PATIENCE,
    REPAIR,
    SEARCH_REPAIR,
    TRAINED_ALREADY,
    Ignored,
    refuse_ignored,
    training,
)
from ..config.prepare import (
    UNTIMED,
    Inputs,
    check_controls,
    check_network_search,
    check_search,
    chosen_layers,
    prepare,
)
from ..config.training import begin_task, build_recovery, finetune
from ..deploy.export import check_exports, try_exports
from ..deploy.runtimes import check_runtimes
from ..pruning.decide import Decider, Decision, observation_tensors
from ..pruning.halving import Trained, Training
from ..pruning.input_checks import resolve_device
from ..pruning.layer_agents import TrainLayerAgents
from ..pruning.network_decide import AskPretrainedAgent, TrainNetworkAgent
from ..pruning.network_schedule import NetworkSchedule, show_update
from ..pruning.network_search import NetworkSearchSettings
from ..pruning.pretrained import load_pretrained, needs_target
from ..pruning.schedule import LayerRecord, Schedule, check_order
from ..pruning.trained_agents import load_agents
from ..reporting.curves import write_curves
from ..runs.context import RunContext
from ..runs.provenance import command_line
from ..training.train_settings import TrainSettings
from .results import Networks, latency_metrics, metrics_of, save_result, show_results, write_results
from .running import carry_out


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("prune", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Run the whole job, or resume an interrupted one; returns what `metrics.json` holds."""
    return carry_out(config, check, prune_network, show_results)


ONE_AGENT = "with a target one agent decides on all layers at once (network_search, repair)."
AN_AGENT_A_LAYER = "without a target an agent decides on each layer (agent, search, reward, policy)."

ONE_BY_ONE = "an agent a layer always keeps a filter of it; give a target, as in target.removed=0.5."


def has_target(config: DictConfig) -> bool:
    """Whether one agent decides on all layers at once."""
    return build_target(config.target) is not None


IGNORED = (
    TRAINED_ALREADY,
    *BASE_TRAINING,
    Ignored("network_search engine", "agents brings one that is only asked.", lambda config: config.agents is not None),
    Ignored(
        "engine",
        "without a target the agents of layers learn one after the other, each on what the last one left; give a "
        "target, or train agents side by side (keepdrop train-agent -m hydra/launcher=ray_cluster).",
        lambda config: not has_target(config) and not build_engine(config).is_here,
    ),
    Ignored("order reward policy agent search warm_start", ONE_AGENT, has_target),
    Ignored(LAYER_EVALUATION, ONE_AGENT, has_target),
    Ignored("target.of network_search repair", AN_AGENT_A_LAYER, lambda config: not has_target(config)),
    Ignored("surgery.whole_blocks", ONE_BY_ONE, lambda config: config.surgery.whole_blocks and not has_target(config)),
    Ignored("target.of", "it says whose MACs target.removed counts.", lambda config: config.target.removed is None),
    UNTIMED,
    COMPENSATION,
    REPAIR,
    SEARCH_REPAIR,
    HALVING,
    PATIENCE,
    *training("recovery.train"),
    *training("finetune"),
)


def check(config: DictConfig) -> Inputs:
    """Find everything that is wrong with the input before anything is written."""
    refuse_ignored(config, IGNORED)
    check_exports(config.export)
    check_order(config.order)
    if config.agents is not None and not has_target(config):
        raise needs_target("target.removed=0.5")
    check_runtimes(config.latency.runtimes, resolve_device(config.device))
    inputs = prepare(config, chosen_layers(config))
    check_controls(config.controls, inputs)
    try_exports(config.export, inputs.construct() if inputs.dense is None else inputs.dense, inputs.splits)
    if not has_target(config):
        check_search(config, inputs)
    else:
        if config.agents is not None:
            load_pretrained(config.agents)
        check_network_search(config, inputs)
        build_engine(config).check(device=str(inputs.device))
    return inputs


def prune_network(inputs: Inputs, context: RunContext) -> dict[str, Any]:
    """Baseline, schedule, fine-tuning, report; every finished part is found again by a resumed run."""
    config, tracker = context.config, context.tracker
    task = begin_task(inputs, context)
    base, n_images = f"Base {display_name(task.objective.name)}", len(task.splits.reward)
    context.terminal.say(f"{base} on {n_images} reward images: {100 * task.base.accuracy:.2f} %")
    pruned, kept, records = run_schedule(task, context)
    one_shot = None if not has_target(config) else OneShotTask(task, build_repair(config))
    write_curves(task, records, context.folder, context.terminal, config.controls, config.seed, one_shot)
    tuned = finetune(task.model, pruned.model, task.splits, context)
    networks = Networks(task.model, pruned.model, tuned.model)
    metrics = metrics_of(networks, task.splits, records, config, tuned)
    metrics |= save_result(networks, kept, task.splits, context)
    metrics |= latency_metrics(networks, task.splits, metrics, context)
    tracker.kept_filters({record.name: record.keep for record in records}, len(records))
    tracker.hparams(plain(config), metrics)
    write_results(metrics, context.folder)
    return metrics


def run_schedule(task: PruningTask, context: RunContext) -> tuple[PruningTask, KeptChannels, list[LayerRecord]]:
    """Layer by layer within a drop bound, or all layers at once at a target."""
    config, recover = context.config, build_recovery(task.model, context)
    log = ScheduleLog(context, task.objective.name)
    if not has_target(config):
        reward = build_reward(config.reward)
        decide = train_layer_agents(context, reward)
        schedule = Schedule(decide, reward, config.drop_bound, recover, config.order, config.seed)
        with context.terminal.progress("layers", len(task.groups)):
            return schedule.run(task, context.folder, log)
    search = settings(config.network_search, NetworkSearchSettings)
    decide_all = train_network_agent(context, search) if config.agents is None else ask_pretrained_agent(config)
    one_shot = NetworkSchedule(decide_all, build_repair(config), config.drop_bound, config.seed, recover)
    with context.terminal.progress("updates", search.agent.updates):
        return one_shot.run(task, context.folder, log)


def ask_pretrained_agent(config: DictConfig) -> AskPretrainedAgent:
    """Asks one that was trained over other networks; nothing is searched."""
    target = build_target(config.target)
    assert target is not None
    return AskPretrainedAgent(load_pretrained(config.agents), target)


def train_network_agent(context: RunContext, search: NetworkSearchSettings) -> TrainNetworkAgent:
    """Trains one agent for all layers, with a bar and a scalar for every metric of every update."""
    config, terminal = context.config, context.terminal
    target = build_target(config.target)
    assert target is not None

    def report(trainer: NetworkTrainer, metrics: Mapping[str, float]) -> None:
        terminal.advance(len(trainer.history), show_update(trainer, metrics))
        context.tracker.scalars(f"agent/{GROUP_NAME}", metrics, len(trainer.history))

    def trained(finalist: Trained) -> None:
        terminal.advance(search.agent.updates, f"finalist {finalist.done} of {finalist.total}")
        terminal.say(f"Finalist {finalist.done} of {finalist.total}, {finalist}")
        found = {"repaired": finalist.candidate.repaired, "trained": finalist.candidate.accuracy}
        context.tracker.scalars("halving", found, finalist.done)

    training = Training(settings(config.finetune, TrainSettings), build_augment(config.augment), trained)
    facts = {"command": command_line(), "config": plain(config)}
    return TrainNetworkAgent(search, target, report, facts, training, build_engine(config))


def train_layer_agents(context: RunContext, reward: RewardFunction) -> Decider:
    """Trains an agent on each layer, or a saved one further, with a bar and records of every update."""
    config, terminal, tracker = context.config, context.terminal, context.tracker
    chosen = settings(config.agent, AgentSettings)

    def report(layer: LayerTask, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        name, step = layer.group.name, len(trainer.history)
        kept, drop = metrics.get("info/kept_fraction", 0.0), metrics.get("info/accuracy_drop", 0.0)
        terminal.advance(
            step,
            f"update {step} of {chosen.updates}, reward {metrics['reward_mean']:+.3f}, kept {kept:.0%}, "
            f"{100 * drop:.1f} points lost",
        )
        tracker.scalars(f"agent/{name}", metrics, step)
        with torch.no_grad():
            probability_N = trainer.policy(observation_tensors(layer)).keep_probability()
        tracker.histogram(f"agent/{name}/keep_probability", probability_N, step)

    agents = TrainLayerAgents(
        build_policy_factory(config.policy),
        reward,
        chosen,
        config.search.masks,
        config.search.images,
        report,
        known=load_agents(config.warm_start) if config.warm_start is not None else {},
        facts={"command": command_line(), "config": plain(config)},
    )

    def decide(layer: LayerTask, working: Path, seed: int) -> Decision:
        with terminal.progress(layer.group.name, chosen.updates):
            return agents(layer, working, seed)

    return decide


def build_repair(config: DictConfig) -> ReconstructionSettings | None:
    """How a network is repaired that is cut in all layers at once; None leaves it as cut."""
    return settings(config.repair, ReconstructionSettings) if config.evaluation.compensate else None


class ScheduleLog:
    """Says and logs what happens to each layer; `metric` is the metric's name."""

    def __init__(self, context: RunContext, metric: str) -> None:
        self.terminal, self.tracker = context.terminal, context.tracker
        self.metric = display_name(metric)

    def layer_begins(self, position: int, total: int, layer: LayerTask) -> None:
        """The bar of the layers; the decider shows its own progress below it."""
        self.terminal.advance(position, f"{position + 1} of {total}: {layer.group.name}")

    def layer_ends(self, position: int, total: int, record: LayerRecord) -> None:
        """One line and the layer's scalars."""
        self.terminal.advance(position + 1)
        self._say(f"[{position + 1}/{total}] {record.name}", [record])
        self._track(position, record)

    def network_ends(self, records: Sequence[LayerRecord]) -> None:
        """One line for the one decision, and the scalars of every layer."""
        self._say(f"{len(records)} layers at once" if len(records) > 1 else records[0].name, records)
        for position, record in enumerate(records):
            self._track(position, record)

    def _say(self, what: str, records: Sequence[LayerRecord]) -> None:
        one, seconds = records[0], sum(each.search_seconds + each.recovery_seconds for each in records)
        kept, filters = sum(each.n_kept for each in records), sum(each.n_filters for each in records)
        self.terminal.say(
            f"{what}: kept {kept} of {filters} ({one.decided_by}), {self.metric} {100 * one.pruned_accuracy:.2f} %, "
            f"recovered {100 * one.recovered_accuracy:.2f} %, {seconds:.0f} s"
        )

    def _track(self, position: int, record: LayerRecord) -> None:
        self.tracker.scalars(
            "schedule",
            {
                "kept_fraction": record.n_kept / record.n_filters,
                "pruned_accuracy": record.pruned_accuracy,
                "recovered_accuracy": record.recovered_accuracy,
            },
            position,
        )
