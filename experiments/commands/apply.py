"""`keepdrop apply agents=RUN checkpoint=NEW`: trained agents on a network they have never seen, beside controls."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from torch import nn

from ...agent.saved_agent import SavedAgent
from ...envs.data.objective import display_name
from ...envs.networks.checkpoint import hash_state
from ...envs.networks.cost import count_cost
from ...envs.one_shot import GROUP_NAME
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.surgery.kept_channels import KeptChannels
from ...envs.surgery.macs_target import Target
from ...envs.task import PruningTask
from ...errors import UserError
from ..config.cli_errors import groups
from ..config.entry_point import begin_or_resume, first_value, is_sweep, plain, run_with_hydra, settings, typed
from ..config.ignored import COMPENSATION, LAYER_EVALUATION, REPAIR, Ignored, refuse_ignored, training
from ..config.prepare import Inputs, prepare
from ..config.schema import INHERITED, LatencyConfig
from ..config.stored import check_targets, inherit, run_with_config
from ..deploy.export import check_exports
from ..deploy.runtimes import check_runtimes
from ..pruning.decide import AskCriterion, Decider
from ..pruning.network_decide import AskNetworkAgent, AskNetworkCriterion, NetworkDecider
from ..pruning.network_schedule import NetworkSchedule
from ..pruning.recover import RecoverySettings
from ..pruning.schedule import LayerRecord, Schedule, check_order
from ..pruning.trained_agents import AskAgents, check_agents, load_agents
from ..reporting.curves import write_curves
from ..runs.console import Terminal
from ..runs.folder import METRICS, RunFolder
from ..runs.provenance import keep_provenance
from ..runs.tracking import Tracker
from ..training.loop import TrainSettings
from .finish import (
    Networks,
    finetune,
    group_facts,
    latency_metrics,
    latency_rows,
    remarks,
    report_accuracy,
    save_result,
)
from .layer_agents import check_controls
from .prune import ScheduleLog, build_recovery
from .report import keep_report

AGENT = "agent"


def main() -> None:
    """Entry point of the command."""
    inherit(first_value("agents", sys.argv[1:]))
    run_with_hydra("apply", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Decide, prune, fine-tune and compare; returns what `metrics.json` holds."""
    config = config if config.resume else inherited(config)
    metrics, folder, terminal = begin_or_resume(config, check, apply_agents)
    keep_report(folder, terminal)
    terminal.methods(metrics["methods"], metrics["base_accuracy"], display_name(metrics.get("metric"), opens=True))
    if rows := latency_rows(metrics.get("latency", [])):
        terminal.totals(rows)
    for sentence in remarks(metrics):
        terminal.console.print(sentence, markup=False)
    terminal.console.print(f"Run folder: {folder.path}", markup=False)
    return metrics


def inherited(config: DictConfig) -> DictConfig:
    """The configuration once it is known that the run it comes from is one, and names no code that nobody typed."""
    for name in ("agents", "checkpoint"):
        if config[name] is None:
            raise UserError(f"{name} is not set; expected keepdrop apply agents=RUN checkpoint=FILE.")
    load_agents(config.agents)
    folder = run_with_config(config.agents)
    if folder is None:
        raise UserError(
            f"{config.agents!r} has agents but no config.yaml; expected the whole folder of a command: copy it again, "
            "or call keepdrop.apply_agents if it was written from Python."
        )
    config = composed_anew(config) if is_sweep() else config
    chosen = HydraConfig.get().runtime.choices
    own = [name for name in groups() if name in config and chosen.get(name) != INHERITED]
    kept = {name: value for name, value in plain(config).items() if name not in own}
    check_targets(kept, typed(), folder.path)
    return config


def composed_anew(config: DictConfig) -> DictConfig:
    """The configuration of one job of a sweep, which may be over the agents, with what its own run brings."""
    inherit(config.agents)
    again = compose("apply", overrides=list(HydraConfig.get().overrides.task))
    again.run_dir = config.run_dir
    return again


IGNORED = (
    Ignored("finetune_controls", "controls=[] leaves nothing to fine-tune.", lambda config: not config.controls),
    Ignored("evaluation.dtype", "trained agents are asked, and nothing is searched."),
    COMPENSATION,
    *training("recovery.train"),
    *training("finetune"),
)
LAYER_BY_LAYER = (Ignored("target repair", "these agents decide layer by layer."),)
ONE_SHOT = (
    Ignored("order", "this agent decides on all layers at once."),
    Ignored(LAYER_EVALUATION, "this agent decides on all layers at once, and repair says how they are repaired."),
    Ignored(
        "target.of", "target.removed=null takes the agent's own target.", lambda config: config.target.removed is None
    ),
    REPAIR,
)


def check(config: DictConfig) -> Inputs:
    """Find every mistake of the user's before anything is written."""
    check_controls(config.controls)
    settings(config.latency, LatencyConfig)
    settings(config.recovery, RecoverySettings)
    settings(config.finetune, TrainSettings)
    check_order(config.order)
    check_exports(config.export)
    known = load_agents(config.agents)
    refuse_ignored(config, [*(ONE_SHOT if GROUP_NAME in known else LAYER_BY_LAYER), *IGNORED])
    with open_dict(config):
        config.layers = known[GROUP_NAME].facts["groups"] if GROUP_NAME in known else list(known)
    inputs = prepare(config)
    assert inputs.dense is not None
    check_runtimes(config.latency.runtimes, inputs.device)
    check_agents(known, inputs.task(inputs.dense, config))
    return inputs


def apply_agents(inputs: Inputs, config: DictConfig, folder: RunFolder, terminal: Terminal) -> dict[str, Any]:
    """The agents first, then every control at the agents' own counts, all with the same recovery and fine-tuning."""
    assert inputs.dense is not None
    task = inputs.task(inputs.dense, config)
    keep_provenance(task, config, folder)
    schedules = Schedules(load_agents(config.agents), task.model, config, terminal)
    methods = {AGENT: prune_with(schedules.agent(), AGENT, task, config, folder, terminal)}
    counts = {record.name: record.n_kept for record in methods[AGENT].records}
    for name in config.controls:
        methods[name] = prune_with(schedules.control(name, counts), name, task, config, folder, terminal)
    ours = methods[AGENT]
    facts = {"base_sha256": hash_state(inputs.dense)}
    exports = save_result(ours.networks, ours.kept, task.splits, config, folder, facts)
    metrics = apply_metrics(methods, task, config) | exports
    write_curves(task, ours.records, folder, terminal)
    folder.write_json(METRICS, metrics)
    return metrics


@dataclass(frozen=True)
class Method:
    """What one way of deciding led to."""

    records: list[LayerRecord]
    networks: Networks
    kept: KeptChannels
    finetune_seconds: float | None


class Schedules:
    """How agents and controls prune: layer by layer, or all layers at once if the agent is one of a whole network."""

    def __init__(
        self, agents: Mapping[str, SavedAgent], dense: nn.Module, config: DictConfig, terminal: Terminal
    ) -> None:
        self.agents, self.config = agents, config
        self.recovery = build_recovery(dense, config, terminal)

    def agent(self) -> Schedule | NetworkSchedule:
        """The trained agents'."""
        if GROUP_NAME in self.agents:
            given = self.config.target
            target = None if given.removed is None else Target(**plain(given))
            return self._at_once(AskNetworkAgent(self.agents[GROUP_NAME], target))
        return self._in_turn(AskAgents(self.agents))

    def control(self, criterion: str, counts: Mapping[str, int]) -> Schedule | NetworkSchedule:
        """A criterion's, at the agent's counts."""
        if GROUP_NAME in self.agents:
            return self._at_once(AskNetworkCriterion(criterion, counts))
        return self._in_turn(AskCriterion(criterion, counts))

    def _at_once(self, decide: NetworkDecider) -> NetworkSchedule:
        config = self.config
        repair = settings(config.repair, ReconstructionSettings) if config.evaluation.compensate else None
        return NetworkSchedule(decide, repair, None, config.seed, self.recovery)

    def _in_turn(self, decide: Decider) -> Schedule:
        return Schedule(decide, None, None, self.recovery, self.config.order, self.config.seed)


def prune_with(
    schedule: Schedule | NetworkSchedule,
    name: str,
    task: PruningTask,
    config: DictConfig,
    folder: RunFolder,
    terminal: Terminal,
) -> Method:
    """Prune as `schedule` says, then fine-tune; everything lies in `methods/NAME`."""
    dense = task.model
    own = RunFolder(folder / "methods" / name)
    tracker = Tracker(folder / "tensorboard" / name)
    terminal.say(f"Pruning with {name}")
    with terminal.progress(name, len(task.groups)):
        pruned, kept, records = schedule.run(task, own, ScheduleLog(terminal, tracker, task.objective.name))
    finetuned, seconds = pruned.model, None
    if name == AGENT or config.finetune_controls:
        finetuned, seconds = finetune(dense, pruned.model, task.splits, config, own, terminal, tracker)
    tracker.kept_filters({record.name: record.keep for record in records}, len(records))
    tracker.close()
    return Method(records, Networks(dense, pruned.model, finetuned), kept, seconds)


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
    networks = methods[AGENT].networks
    fraction = ours["pruned_macs"] / task.base.cost.macs
    timed = latency_metrics(networks, task.example, fraction, config)
    return base | ours | timed | {"drop_bound": config.drop_bound, "bound_held": held, "methods": rows}


def method_metrics(method: Method, task: PruningTask) -> dict[str, Any]:
    """One row of the comparison."""
    cost = count_cost(method.networks.pruned, task.example)
    tuned = method.finetune_seconds is not None
    return {
        "pruned_accuracy": report_accuracy(method.networks.pruned, task.splits),
        "finetuned_accuracy": report_accuracy(method.networks.finetuned, task.splits) if tuned else None,
        "pruned_macs": cost.macs,
        "pruned_params": cost.params,
        "finetune_seconds": method.finetune_seconds,
        "groups": [group_facts(record) for record in method.records],
    }
