"""Accuracy against MACs: Ray Tune prunes one network in many ways; the front of those that nothing beats, drawn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keepdrop
from keepdrop.envs.data.sources import digits
from keepdrop.experiments.api.ray_trials import trainable
from quickstart import trained
from ray import tune


def front(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trials that no other one beats in both accuracy and MACs, fewest MACs first."""
    best: list[dict[str, Any]] = []
    for each in sorted(trials, key=lambda trial: (trial["macs_fraction"], -trial["accuracy"])):
        if not best or each["accuracy"] > best[-1]["accuracy"]:
            best.append(each)
    return best


def draw(trials: Sequence[dict[str, Any]], file: Path) -> None:
    """Every trial a dot, the front a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.scatter([100 * each["macs_fraction"] for each in trials], [100 * each["accuracy"] for each in trials])
    line = front(trials)
    axes.plot([100 * each["macs_fraction"] for each in line], [100 * each["accuracy"] for each in line])
    axes.set(xlabel="MACs left, %", ylabel="accuracy on the report images, %", title="Pruned and fine-tuned")
    figure.savefig(file)
    pyplot.close(figure)


def main(
    space: dict[str, Any] | None = None, samples: int = 1, storage: str = "tuned", epochs: int = 10, updates: int = 10
) -> list[dict[str, Any]]:
    """Run, or resume from `storage`, all trials; returns the front."""
    data = digits()
    prune = trainable(
        trained(data, epochs),
        data.train,
        data.test,
        settings=keepdrop.Settings(reward_size=200),
        finetune=keepdrop.TrainSettings(batch_size=64, top_lr=0.05),
    )
    space = space or {
        "macs_removed": tune.grid_search([0.3, 0.5, 0.7, 0.85]),
        "finetune.epochs": tune.grid_search([2, 10]),
        "settings.network.agent.updates": updates,
    }
    where, name = Path(storage).absolute(), "front"
    if tune.Tuner.can_restore(str(where / name)):
        tuner = tune.Tuner.restore(str(where / name), prune, resume_errored=True)
    else:
        failures = tune.FailureConfig(max_failures=2)  # a trial goes on from its checkpoint
        run = tune.RunConfig(name=name, storage_path=str(where), failure_config=failures, verbose=1)
        tuner = tune.Tuner(prune, param_space=space, run_config=run, tune_config=tune.TuneConfig(num_samples=samples))
    trials = [result.metrics for result in tuner.fit() if result.error is None and result.metrics]
    draw(trials, where / "front.png")
    best = front(trials)
    for each in best:
        asked = ", ".join(f"{key} {value:g}" for key, value in each["config"].items())
        print(f"{each['macs_fraction']:.0%} of the MACs, {each['accuracy']:.2%} accuracy: {asked}")
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default="tuned", help="folder, on a shared disk where there are several machines")
    main(storage=parser.parse_args().storage)
