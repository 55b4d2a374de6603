"""`keepdrop iterate criterion=taylor`: rank all filters, drop the least important few, train a little, repeat."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from ..config.entry_point import plain, run_with_hydra
from ..config.ignored import BASE_TRAINING, TRAINED_ALREADY, Ignored, refuse_ignored, training
from ..config.prepare import Inputs, prepare
from ..config.training import begin_task, finetune
from ..deploy.runtimes import check_runtimes
from ..iterate.curve import write_curve
from ..iterate.iteration import Iteration, State, goal, how
from ..pruning.schedule import LayerRecord
from ..runs.context import RunContext
from .results import Networks, latency_metrics, metrics_of, save_result, show_results, write_results
from .running import carry_out


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("iterate", run)


def run(config: DictConfig) -> dict[str, Any]:
    """Run the whole job, or resume an interrupted one; returns what `metrics.json` holds."""
    return carry_out(config, check, iterate, show_results)


IGNORED = (
    TRAINED_ALREADY,
    *BASE_TRAINING,
    Ignored("train.epochs", "minibatches says how long is trained between two removals."),
    Ignored(
        "drop_bound",
        "target.removed says when to stop; target.hold_bound=true stops where the bound breaks, too.",
        lambda config: not (config.target.hold_bound or config.target.removed is None),
    ),
    Ignored(
        "target.resource target.hold_bound",
        "with target.removed=null drop_bound alone says when to stop.",
        lambda config: config.target.removed is None,
    ),
    Ignored(
        "surgery.whole_blocks",
        "filters go a few at a time here, and the last one of a layer stays.",
        lambda config: config.surgery.whole_blocks,
    ),
    *training("train"),
    *training("finetune"),
)


def check(config: DictConfig) -> Inputs:
    """Find everything that is wrong with the input before anything is written."""
    refuse_ignored(config, IGNORED)
    how(config)
    goal(config)
    inputs = prepare(config, plain(config.layers))
    check_runtimes(config.latency.runtimes, inputs.device)
    return inputs


def iterate(inputs: Inputs, context: RunContext) -> dict[str, Any]:
    """Baseline, steps, fine-tuning, report; every finished part is found again by a resumed run."""
    config, task = context.config, begin_task(inputs, context)
    job = Iteration(task, context)
    state = job.run()
    write_curve(job.records, task, context.folder, context.terminal, config)
    tuned = finetune(task.model, state.model, task.splits, context)
    networks = Networks(task.model, state.model, tuned.model)
    metrics = metrics_of(networks, task.splits, layer_records(job, state, config), config, tuned)
    metrics |= save_result(networks, state.kept, task.splits, context)
    metrics |= latency_metrics(networks, task.splits, metrics, context)
    write_results(metrics, context.folder, "iterate")
    return metrics


def layer_records(job: Iteration, state: State, config: DictConfig) -> list[LayerRecord]:
    """What became of every layer, for the tables."""
    accuracy = job.records[-1]["accuracy"]
    seconds = sum(record["seconds"] for record in job.records) / len(job.task.groups)
    bound = goal(config).drop_bound
    within = bound is None or job.task.base.accuracy - accuracy <= bound + 1e-9
    found = []
    for group in job.task.groups:
        keep = [number in set(state.left[group.name]) for number in range(group.n_filters)]
        counts = (group.name, group.n_filters, sum(keep), keep)
        found.append(LayerRecord(*counts, config.criterion, accuracy, accuracy, within, 0.0, seconds, {}))
    return found
