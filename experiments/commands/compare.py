"""`keepdrop compare`: the agent and every other method on one checkpoint, at equal MACs, cut and measured alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig

from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.repair.reconstruction_error import RECONSTRUCTION
from ...envs.surgery.targets import Target
from ..compare.choices import Choices
from ..compare.measuring import TRAINED, choose, measure, result_name, unmeasured
from ..compare.methods import AGENT, PEERS
from ..compare.plan import Job, check_plan, chosen_methods, planned
from ..compare.tables import show, summary, write_all
from ..compare.torch_pruning import unavailable
from ..compare.workers import DoAll, Work, workers
from ..config.build import build_engine
from ..config.entry_point import plain, run_path, run_with_hydra, settings
from ..config.ignored import (
    BASE_TRAINING,
    HALVING,
    LAYER_EVALUATION,
    PROCESSES,
    TRAINED_ALREADY,
    Ignored,
    has_checkpoint,
    refuse_ignored,
    training,
)
from ..config.prepare import Inputs, check_controls, check_targets, prepare
from ..config.training import begin_task
from ..pruning.agent_places import PRETRAINED
from ..pruning.network_search import NetworkSearchSettings
from ..pruning.pretrained import load_pretrained
from ..runs.console import Terminal
from ..runs.context import RunContext
from .running import carry_out


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("compare", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Compare, or resume a comparison; returns what `metrics.json` holds."""
    return carry_out(config, check, compare, lambda metrics, context: show(metrics, context.terminal))


def _without(*names: str) -> Callable[[DictConfig], bool]:
    return lambda config: not set(names) & set(chosen_methods(config))


def _untrained(config: DictConfig) -> bool:
    return not set(config.stages) & set(TRAINED) and not config.network_search.halving.candidates


SEARCHES = ("random-best", "taylor-random-best")
IGNORED = (
    TRAINED_ALREADY,
    *BASE_TRAINING,
    Ignored("seed", "every method runs with its own of seeds, as in seeds=[0,1].", has_checkpoint),
    Ignored("evaluation.compensate", "compensate=[false,true] chooses it, once each way."),
    Ignored(LAYER_EVALUATION, "networks are cut for real and repaired here (repair)."),
    Ignored(
        "repair network_search.repair_images network_search.repair_places",
        "compensate=[false] repairs nothing.",
        lambda config: not any(config.compensate),
    ),
    Ignored("bn_images", "stages does not name bn.", lambda config: "bn" not in config.stages),
    Ignored("finetune", "stages names neither one nor full.", _untrained),
    Ignored(
        "augment", "stages names neither one nor full.", lambda config: _untrained(config) and has_checkpoint(config)
    ),
    Ignored("random_seeds", "methods does not name random-uniform.", _without("random-uniform")),
    Ignored("random_best", "methods does not name random-best.", _without(*SEARCHES)),
    Ignored(
        "network_search.masks network_search.warm_start network_search.agent network_search.halving",
        "methods does not name agent.",
        _without(AGENT),
    ),
    Ignored("network_search", "methods names neither agent nor random-best.", _without(AGENT, *SEARCHES)),
    HALVING,
    PROCESSES,
    *training("finetune"),
)


def check(config: DictConfig) -> Inputs:
    """Find everything that is wrong with the input before anything is written."""
    targets = [Target(removed, config.targets.of) for removed in config.targets.removed]
    check_plan(config)
    refuse_ignored(config, IGNORED)
    repair = settings(config.repair, ReconstructionSettings)
    inputs = prepare(config, plain(config.layers))
    check_targets(inputs, targets, repair if any(config.compensate) else None)
    search = settings(config.network_search, NetworkSearchSettings)
    if search.reads is not None and AGENT in chosen_methods(config):
        load_pretrained(search.reads)
    if chosen_methods(config) == [PRETRAINED]:  # beside others it is left out where it cannot be loaded
        load_pretrained(PRETRAINED)
    if chosen_methods(config) == [RECONSTRUCTION]:  # beside others it is left out where it cannot judge a layer
        check_controls([RECONSTRUCTION], inputs)
    build_engine(config).check(run_path(config), str(inputs.device))
    return inputs


def compare(inputs: Inputs, context: RunContext) -> dict[str, Any]:
    """Base, choices, measurements, tables; everything that is finished is found again by a resumed run."""
    config, folder, terminal = context.config, context.folder, context.terminal
    task = begin_task(inputs, context)
    if (why := unavailable()) and set(chosen_methods(config)) & set(PEERS):
        terminal.warn(why)
    choices, jobs = Choices(task, config, folder), planned(config)
    with workers(choices, build_engine(config)) as do_all:
        choose_all(do_all, choices, jobs, terminal)
        measure_all(do_all, choices, jobs, terminal)
    metrics = summary(choices, jobs, config, folder)
    write_all(metrics, folder, terminal)
    return metrics


def choose_all(do_all: DoAll, choices: Choices, jobs: Sequence[Job], terminal: Terminal) -> None:
    """Every method chooses for every job, before any of them is measured on the report split."""
    missing = [job for job in jobs if not choices.has(job)]
    agents = [job for job in missing if job.method == AGENT]  # first: other methods follow them
    others = [job for job in missing if job.method != AGENT]
    with terminal.progress("choosing", len(missing)) as bar:
        for job in _shown(bar, do_all, choose, (agents, others), choices):
            if job.method == AGENT:
                record = choices.record(job)
                _line(terminal, f"{job.label}: {record['facts']['mask_evaluations']} masks, {record['seconds']:.0f} s")
    terminal.say(f"Chosen: {len(jobs)} sets of masks")


def measure_all(do_all: DoAll, choices: Choices, jobs: Sequence[Job], terminal: Terminal) -> None:
    """Every job at every stage, the quick stages of all jobs first."""
    folder, jobs = choices.folder, [job for job in jobs if "skipped" not in choices.record(job)]
    quick = [stage for stage in choices.config.stages if stage not in TRAINED]
    for stages in filter(None, (quick, *([stage] for stage in choices.config.stages if stage in TRAINED))):
        what, missing = " and ".join(stages), [job for job in jobs if unmeasured(folder, job, stages)]
        with terminal.progress(what, len(missing)) as bar:
            for job in _shown(bar, do_all, partial(measure, stages=stages), (missing,), choices):
                if stages != quick:
                    accuracy = folder.read_json(result_name(job, stages[0]))["reward_accuracy"]
                    _line(terminal, f"{job.label}, {what}: {100 * accuracy:.2f} % on the reward split")
        terminal.say(f"Measured: {what}")


def _shown(bar: Terminal, do_all: DoAll, work: Work, waves: Sequence[Sequence[Job]], choices: Choices) -> Iterator[Job]:
    """Each job as soon as it is done, one wave after the other; the bar also moves within a job of this process."""
    n_done = 0

    def show(fraction: float, detail: str) -> None:
        bar.advance(n_done + min(fraction, 1.0), detail)

    choices.report = show
    for job in (job for wave in waves for job in do_all(work, wave)):
        choices.folder.sync()
        n_done += 1
        bar.advance(n_done, job.label)
        yield job


def _line(terminal: Terminal, text: str) -> None:
    """A line about one job where there is no bar to show it."""
    if not terminal.console.is_terminal:
        terminal.say(text)
