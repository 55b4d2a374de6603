"""`keepdrop apply agents=RUN checkpoint=NEW`: trained agents on a network they have never seen, beside controls."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

from ...agent.saved_agent import SavedAgent
from ...envs.data.objective import display_name
from ...envs.networks.cost import count_cost
from ...envs.one_shot import GROUP_NAME
from ...envs.surgery.kept_channels import KeptChannels
from ...envs.task import PruningTask
from ...errors import UserError
from ..config.build import build_target
from ..config.cli_errors import groups
from ..config.entry_point import check_settings, first_value, is_sweep, plain, run_with_hydra, typed
from ..config.ignored import COMPENSATION, LAYER_EVALUATION, REPAIR, Ignored, refuse_ignored, training
from ..config.prepare import UNTIMED, Inputs, check_controls, check_targets, is_timed, prepare
from ..config.schema import INHERITED, ApplyConfig, TargetConfig
from ..config.stored import check_targets as check_code
from ..config.stored import inherit, run_with_config
from ..config.training import Tuned, begin_task, build_recovery, finetune
from ..deploy.clock import PROFILE
from ..deploy.export import check_exports, try_exports
from ..deploy.runtimes import check_runtimes
from ..pruning.agent_card import ANY_NETWORK
from ..pruning.agent_places import is_bare, local_folder
from ..pruning.decide import AskCriterion, Decider
from ..pruning.input_checks import resolve_device
from ..pruning.network_decide import AskNetworkAgent, AskNetworkCriterion, AskPretrainedAgent, NetworkDecider
from ..pruning.network_schedule import NetworkSchedule
from ..pruning.pretrained import check_reads_networks, needs_target
from ..pruning.schedule import LayerRecord, Schedule, check_order
from ..pruning.trained_agents import AskAgents, check_agents, load_agents
from ..reporting.curves import write_curves
from ..runs.context import RunContext
from ..runs.folder import METRICS, RunFolder
from .prune import ScheduleLog, build_repair
from .results import (
    Networks,
    group_facts,
    latency_metrics,
    latency_rows,
    report_accuracy,
    save_result,
    show_remarks,
    target_facts,
)
from .running import carry_out

AGENT = "agent"


def main() -> None:
    """Entry point of the command."""
    inherit(first_value("agents", sys.argv[1:]))
    run_with_hydra("apply", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Decide, prune, fine-tune and compare; returns what `metrics.json` holds."""
    config = config if config.resume else inherited(config)
    return carry_out(config, check, apply_agents, show)


def show(metrics: Mapping[str, Any], context: RunContext) -> None:
    """The agents beside the controls, and latency."""
    terminal = context.terminal
    terminal.methods(metrics["methods"], metrics["base_accuracy"], display_name(metrics.get("metric"), opens=True))
    if rows := latency_rows(metrics.get("latency", [])):
        terminal.totals(rows)
    show_remarks(metrics, context)


def inherited(config: DictConfig) -> DictConfig:
    """The configuration once it is known that the run it comes from is one, and names no code that nobody typed."""
    for name in ("agents", "checkpoint"):
        if config[name] is None:
            raise UserError(f"{name} is not set; expected keepdrop apply agents=RUN checkpoint=FILE.")
    load_agents(config.agents)
    folder = run_with_config(config.agents)
    if folder is None and is_bare(config.agents):
        folder = RunFolder(local_folder(config.agents))
    if folder is None:
        raise UserError(
            f"{config.agents!r} has agents but no config.yaml; expected the whole folder of a command: copy it again, "
            "or call keepdrop.apply_agents if it was written from Python."
        )
    config = composed_anew(config) if is_sweep() else config
    chosen = HydraConfig.get().runtime.choices
    own = [name for name in groups() if name in config and chosen.get(name) != INHERITED]
    kept = {name: value for name, value in plain(config).items() if name not in own}
    check_code(kept, typed(), folder.path)
    return config


def composed_anew(config: DictConfig) -> DictConfig:
    """The configuration of one job of a sweep, which may be over the agents, with what its own run brings."""
    inherit(config.agents)
    again = compose("apply", overrides=list(HydraConfig.get().overrides.task))
    again.run_dir = config.run_dir
    check_settings(again, ApplyConfig)
    return again


IGNORED = (
    Ignored("finetune_controls", "controls=[] leaves nothing to fine-tune.", lambda config: not config.controls),
    Ignored("evaluation.dtype", "trained agents are asked, and nothing is searched."),
    COMPENSATION,
    *training("recovery.train"),
    *training("finetune"),
)
LAYER_BY_LAYER = (Ignored("target repair", "these agents decide layer by layer."),)
ANY_SHOT = (
    Ignored("order", "this agent decides on all layers at once."),
    Ignored(LAYER_EVALUATION, "this agent decides on all layers at once, and repair says how they are repaired."),
    Ignored(
        "target.of",
        "it says whose MACs target.removed counts.",
        lambda config: build_target(config.target) is not None and config.target.removed is None,
    ),
    REPAIR,
)
ONE_SHOT = (
    Ignored(
        "target.of", "target.removed=null takes the agent's own target.", lambda config: config.target.removed is None
    ),
    *ANY_SHOT,
)


def check(config: DictConfig) -> Inputs:
    """Find everything that is wrong with the input before anything is written."""
    check_order(config.order)
    check_exports(config.export)
    known = load_agents(config.agents)
    form = ANY_SHOT if ANY_NETWORK in known else ONE_SHOT if GROUP_NAME in known else LAYER_BY_LAYER
    refuse_ignored(config, [*form, *IGNORED])
    if ANY_NETWORK in known:
        check_reads_networks(known[ANY_NETWORK])
        if build_target(config.target) is None:
            raise needs_target("target.removed=0.5")
    if GROUP_NAME in known:
        take_target(config, known[GROUP_NAME])
    refuse_ignored(config, [UNTIMED])
    check_runtimes(config.latency.runtimes, resolve_device(config.device))
    inputs = prepare(config, layers_of(known))
    check_controls(config.controls, inputs)
    assert inputs.dense is not None
    if target := build_target(config.target):
        check_targets(inputs, [target], None)
    try_exports(config.export, inputs.dense, inputs.splits)
    check_agents(known, inputs.task(inputs.dense))
    return inputs


def layers_of(known: Mapping[str, SavedAgent]) -> list[str] | None:
    """The layers that agents were trained for; None for one that reads networks: all that can be pruned."""
    if ANY_NETWORK in known:
        return None
    return list(known[GROUP_NAME].facts["groups"]) if GROUP_NAME in known else list(known)


def take_target(config: DictConfig, agent: SavedAgent) -> None:
    """What the agent was trained for where nothing else is asked of it, and the times that its run went by."""
    if build_target(config.target) is None:
        config.target = {**asdict(TargetConfig()), **agent.facts["target"]}
    before = local_folder(config.agents) / PROFILE
    if is_timed(config) and config.profile.file is None and before.is_file():
        config.profile.file = str(before)


def apply_agents(inputs: Inputs, context: RunContext) -> dict[str, Any]:
    """The agents first, then every control at the agents' own counts, all with the same recovery and fine-tuning."""
    config, task = context.config, begin_task(inputs, context)
    schedules = Schedules(load_agents(config.agents), task.model, context)
    methods = {AGENT: prune_with(schedules.agent(), AGENT, task, context)}
    counts = {record.name: record.n_kept for record in methods[AGENT].records}
    for name in config.controls:
        methods[name] = prune_with(schedules.control(name, counts), name, task, context)
    ours = methods[AGENT]
    metrics = apply_metrics(methods, task, config) | save_result(ours.networks, ours.kept, task.splits, context)
    metrics |= latency_metrics(ours.networks, task.splits, metrics, context)
    write_curves(task, ours.records, context.folder, context.terminal)
    context.folder.write_json(METRICS, metrics)
    return metrics


@dataclass(frozen=True)
class Method:
    """What one way of deciding led to."""

    records: list[LayerRecord]
    networks: Networks
    kept: KeptChannels
    tuned: Tuned | None


class Schedules:
    """How agents and controls prune: layer by layer, or all layers at once if the agent is one of a whole network."""

    def __init__(self, agents: Mapping[str, SavedAgent], dense: nn.Module, context: RunContext) -> None:
        self.agents, self.config = agents, context.config
        self.recovery = build_recovery(dense, context)

    def agent(self) -> Schedule | NetworkSchedule:
        """The trained agents'."""
        target = build_target(self.config.target)
        if ANY_NETWORK in self.agents:
            assert target is not None
            return self._at_once(AskPretrainedAgent(self.agents[ANY_NETWORK], target))
        if GROUP_NAME in self.agents:
            return self._at_once(AskNetworkAgent(self.agents[GROUP_NAME], target))
        return self._in_turn(AskAgents(self.agents))

    def control(self, criterion: str, counts: Mapping[str, int]) -> Schedule | NetworkSchedule:
        """A criterion's, at the agent's counts."""
        if not {ANY_NETWORK, GROUP_NAME}.isdisjoint(self.agents):
            return self._at_once(AskNetworkCriterion(criterion, counts))
        return self._in_turn(AskCriterion(criterion, counts))

    def _at_once(self, decide: NetworkDecider) -> NetworkSchedule:
        return NetworkSchedule(decide, build_repair(self.config), None, self.config.seed, self.recovery)

    def _in_turn(self, decide: Decider) -> Schedule:
        return Schedule(decide, None, None, self.recovery, self.config.order, self.config.seed)


def prune_with(schedule: Schedule | NetworkSchedule, name: str, task: PruningTask, context: RunContext) -> Method:
    """Prune as `schedule` says, then fine-tune; everything lies in `methods/NAME`."""
    own = context.part(name)
    own.terminal.say(f"Pruning with {name}")
    with closing(own.tracker):
        with own.terminal.progress(name, len(task.groups)):
            pruned, kept, records = schedule.run(task, own.folder, ScheduleLog(own, task.objective.name))
        tuned = None
        if name == AGENT or own.config.finetune_controls:
            tuned = finetune(task.model, pruned.model, task.splits, own)
        own.tracker.kept_filters({record.name: record.keep for record in records}, len(records))
    networks = Networks(task.model, pruned.model, pruned.model if tuned is None else tuned.model)
    return Method(records, networks, kept, tuned)


def apply_metrics(methods: Mapping[str, Method], task: PruningTask, config: DictConfig) -> dict[str, Any]:
    """What `metrics.json` holds; accuracies are fractions on the report split, opened here for the first time."""
    rows = {name: method_metrics(method, task) for name, method in methods.items()}
    base = {
        "metric": task.objective.name,
        "base_accuracy": report_accuracy(task.model, task.splits),
        "base_macs": task.base.cost.macs,
        "base_params": task.base.cost.params,
    }
    ours = {key: value for key, value in rows[AGENT].items() if key != "bound_held"}
    held = task.base.accuracy - methods[AGENT].records[-1].pruned_accuracy <= config.drop_bound + 1e-9
    return base | ours | {"drop_bound": config.drop_bound, "bound_held": held, "methods": rows}


def method_metrics(method: Method, task: PruningTask) -> dict[str, Any]:
    """One row of the comparison."""
    cost = count_cost(method.networks.pruned, task.example)
    tuned = method.tuned
    return {
        "pruned_accuracy": report_accuracy(method.networks.pruned, task.splits),
        "finetuned_accuracy": report_accuracy(method.networks.finetuned, task.splits) if tuned is not None else None,
        "pruned_macs": cost.macs,
        "pruned_params": cost.params,
        "finetune_seconds": None if tuned is None else tuned.seconds,
        "finetune": {} if tuned is None else dict(tuned.judged),
        "groups": [group_facts(record) for record in method.records],
        "target": target_facts(method.records),
    }
