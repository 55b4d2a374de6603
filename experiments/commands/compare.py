"""`keepdrop compare`: the agent and every other method on one checkpoint, at equal MACs, cut and measured alike."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from ...envs.evaluation.mask_evaluator import accuracy_on
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.surgery.macs_target import Target
from ...envs.task import PruningTask
from ..compare.choices import Choices
from ..compare.measuring import TRAINED, MeasureSettings, result_name, train_to_stage
from ..compare.methods import AGENT, PEERS
from ..compare.plan import Job, check_plan, chosen_methods, planned
from ..compare.tables import show, summary, write_all
from ..compare.torch_pruning import unavailable
from ..compare.workers import helpers, share_of
from ..config.baseline_training import WEIGHTS, begin_task
from ..config.build import build_augment, load_network
from ..config.entry_point import begin_or_resume, run_with_hydra, settings
from ..config.prepare import Inputs, check_targets, prepare
from ..config.widened import as_prune
from ..pruning.network_search import NetworkSearchSettings
from ..runs.console import Terminal
from ..runs.folder import RunFolder
from ..training.loop import TrainProgress, TrainSettings
from .report import keep_report


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("compare", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Compare, or go on comparing; returns what `metrics.json` holds."""
    metrics, folder, terminal = begin_or_resume(config, check, compare)
    keep_report(folder, terminal)
    show(metrics, terminal)
    terminal.console.print(f"Run folder: {folder.path}", markup=False)
    return metrics


def check(config: DictConfig) -> Inputs:
    """Find every mistake of the user's before anything is written."""
    for node in (config.finetune, config.base):
        settings(node, TrainSettings)
    targets = [Target(removed, config.targets.of) for removed in config.targets.removed]
    check_plan(config)
    settings(config.network_search, NetworkSearchSettings)
    repair = settings(config.repair, ReconstructionSettings)
    inputs = prepare(as_prune(config))
    check_targets(inputs, targets, repair if any(config.compensate) else None)
    return inputs


def compare(inputs: Inputs, config: DictConfig, folder: RunFolder, terminal: Terminal) -> dict[str, Any]:
    """Base, choices, measurements, tables; everything that is finished is found again by a resumed run."""
    task = begin_task(inputs, config, folder, terminal, pruning=as_prune(config))
    if (why := unavailable()) and set(chosen_methods(config)) & set(PEERS):
        terminal.warn(why)
    choices, jobs = Choices(task, config, folder), planned(config)
    with helpers(folder.path, config.workers, help_out):
        mine = share_of(jobs, 0, config.workers)
        choose_all(choices, mine, terminal)
        measure_all(choices, mine, config, folder, terminal)
    # Whatever the helpers could not do; everything else is found on disk.
    choose_all(choices, jobs, Terminal(quiet=True))
    measure_all(choices, jobs, config, folder, Terminal(quiet=True))
    metrics = summary(choices, jobs, config, folder)
    write_all(metrics, folder, terminal)
    return metrics


def help_out(path: Path, index: int, workers: int) -> None:
    """One helper's share of the run in folder `path`."""
    folder = RunFolder.open(path)
    config, terminal = folder.config(), Terminal(quiet=True)
    inputs = prepare(as_prune(config))
    dense = inputs.dense or load_network(inputs.construct, str(folder / "base" / WEIGHTS)).to(inputs.device)
    choices = Choices(inputs.task(dense, as_prune(config)), config, folder)
    jobs = share_of(planned(config), index, workers)
    choose_all(choices, jobs, terminal)
    measure_all(choices, jobs, config, folder, terminal)


def choose_all(choices: Choices, jobs: list[Job], terminal: Terminal) -> None:
    """Every method chooses for every job, before any of them is measured on the report split."""
    with terminal.progress("choosing", len(jobs)) as bar:
        for position, job in enumerate(jobs):
            bar.advance(position, job.label)
            choices.report = partial(_learning, bar, position, job)
            record = choices.record(job)
            if job.method == AGENT:
                _line(terminal, f"{job.label}: {record['facts']['mask_evaluations']} masks, {record['seconds']:.0f} s")
    terminal.say(f"Chosen: {len(jobs)} sets of masks")


def _learning(bar: Terminal, position: int, job: Job, done: float, detail: str) -> None:
    bar.advance(position + min(done, 1.0), f"{job.label}, {detail}")


def _line(terminal: Terminal, text: str) -> None:
    """A line about one job where there is no bar to show it."""
    if not terminal.console.is_terminal:
        terminal.say(text)


def measure_all(choices: Choices, jobs: list[Job], config: DictConfig, folder: RunFolder, terminal: Terminal) -> None:
    """Every job at every stage, the quick stages of all jobs first."""
    measuring = MeasureSettings(
        config.bn_images, settings(config.finetune, TrainSettings), build_augment(config.augment)
    )
    jobs = [job for job in jobs if "skipped" not in choices.record(job)]
    quick = [stage for stage in config.stages if stage not in TRAINED]
    for stages in filter(None, (quick, *([stage] for stage in config.stages if stage in TRAINED))):
        what = " and ".join(stages)
        with terminal.progress(what, len(jobs)) as bar:
            for position, job in enumerate(jobs):
                bar.advance(position, job.label)
                _Measurement(choices, job, measuring, folder, bar, position).run(stages)
                if stages != quick:
                    accuracy = folder.read_json(result_name(job, stages[0]))["reward_accuracy"]
                    _line(terminal, f"{job.label}, {what}: {100 * accuracy:.2f} % on the reward split")
        terminal.say(f"Measured: {what}")


class _Measurement:
    """Measures one job at some stages."""

    def __init__(
        self,
        choices: Choices,
        job: Job,
        settings: MeasureSettings,
        folder: RunFolder,
        bar: Terminal,
        position: int,
    ) -> None:
        self.choices, self.job, self.settings = choices, job, settings
        self.folder, self.bar, self.position = folder, bar, position

    def run(self, stages: list[str]) -> None:
        """Cut once, then each stage that has no result yet."""
        missing = [stage for stage in stages if self.folder.read_json(result_name(self.job, stage)) is None]
        if not missing:
            return
        evaluation = self.choices.judge_of(self.job)
        model = evaluation.cut(evaluation.joined(self.choices.masks(self.choices.record(self.job))))
        for stage in missing:
            self._measure(stage, model, evaluation.task)

    def _measure(self, stage: str, model: nn.Module, task: PruningTask) -> None:
        snapshot = (self.folder / result_name(self.job, stage)).with_suffix(".snapshot")
        if stage in TRAINED:
            snapshot.parent.mkdir(parents=True, exist_ok=True)
        reached = train_to_stage(
            stage, model, task, self.settings, self.job.seed, progress=self._show, snapshot=snapshot
        )
        result = {f"{role}_accuracy": accuracy_on(reached, getattr(task.splits, role)) for role in ("reward", "report")}
        self.folder.write_json(result_name(self.job, stage), result)
        snapshot.unlink(missing_ok=True)

    def _show(self, progress: TrainProgress) -> None:
        done = self.position + progress.step / progress.n_steps
        self.bar.advance(done, f"{self.job.label}, loss {progress.loss:.3f}")
