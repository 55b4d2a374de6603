"""What halving brings a search: its choice without and with it, and the controls, after the same short training.

    python benchmarks/halving.py --data cifar10.npz --checkpoint resnet20.th [--removed 0.7] [--seeds 0 1]

One search per seed; halving trains its best masks further from there. Then every choice is cut, repaired and trained
alike, for some hundred minibatches of the recipe (`conf/recipe/field.yaml`), and judged on the reward split (what a
search could see) and on the report split. Writes after every figure and continues from what it finds.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import machine, make_task, opened
from foresight import judged, masks_of, shape_of
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings
from keepdrop.envs.evaluation.mask_evaluator import accuracy_on
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.targets import Target
from keepdrop.experiments.compare.methods import CriterionMethod, Masks, Observations, ReconstructionMethod
from keepdrop.experiments.pruning.halving import HalvingSettings, Training
from keepdrop.experiments.pruning.network_search import NetworkAgent, NetworkSearchSettings
from keepdrop.experiments.runs.seeds import derive_seed
from keepdrop.experiments.training.augment import RandomCropFlip
from keepdrop.experiments.training.loop import TrainSettings, fit_network
from keepdrop.experiments.training.rate import bearable_rate

RESULTS = Path(__file__).parents[1] / "benchmarks/results/halving.json"
RECIPE = TrainSettings(batch_size=128, top_lr=0.05, distill_weight=0.9)


def searched(one_shot: OneShotTask, target: Target, seed: int, halving: bool, options: argparse.Namespace) -> Any:
    """A search's masks and its facts; the one with halving begins with the finished one without."""
    rungs = HalvingSettings(options.candidates if halving else [], options.minibatches)
    settings = NetworkSearchSettings(agent=NetworkAgentSettings(updates=options.updates), halving=rungs)
    training = Training(
        replace(RECIPE, bf16=not options.fp32), RandomCropFlip(), lambda trained: print(trained, flush=True)
    )
    state = options.json.with_suffix(f".{target.removed:g}.{seed}.state")

    def shown(trainer: Any, metrics: Any) -> None:
        print(len(trainer.history), metrics["reward_mean"], time.process_time(), flush=True)

    agent = NetworkAgent(settings, one_shot, shown, state, training)
    return agent.choose(target, seed), agent.facts


def tuned(one_shot: OneShotTask, masks: Masks, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Accuracies of a choice, repaired and trained."""
    task, model = one_shot.task, one_shot.cut(one_shot.joined(masks))
    found = {"repaired": judged(model, task)["accuracy"]}
    per_epoch = -(-len(task.splits.fit) // RECIPE.batch_size)
    settings = replace(RECIPE, epochs=options.steps / per_epoch, bf16=not options.fp32)
    shared: Any = {"seed": derive_seed(seed, "finetune"), "augment": RandomCropFlip(), "teacher": task.model}
    settings = replace(settings, lr=bearable_rate(model, task.splits.fit, settings, **shared))
    fit_network(model, task.splits.fit, settings, **shared)
    return found | {"trained": judged(model, task)["accuracy"], "report": accuracy_on(model, task.splits.report)}


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--removed", type=float, default=0.7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--updates", type=int, default=25)
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 3])
    parser.add_argument("--minibatches", type=int, nargs="+", default=[50, 200], help="of 128")
    parser.add_argument("--steps", type=int, default=400, help="minibatches of the training that decides")
    parser.add_argument("--fp32", action="store_true", help="bfloat16 otherwise")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    task = make_task(options.data, options.checkpoint, ["layer*.conv1"])
    one_shot = OneShotTask(task, ReconstructionSettings(images=1000))
    kept = ("removed", "updates", "candidates", "minibatches", "steps", "fp32")
    found = opened(options.json, {"network": "resnet20", **{name: getattr(options, name) for name in kept}}, "rows")
    found.setdefault("machine", machine())
    target, seen = Target(options.removed, "network"), Observations()
    chosen: dict[str, Any] = {
        "search": lambda seed: searched(one_shot, target, seed, False, options),
        "search, halving": lambda seed: searched(one_shot, target, seed, True, options),
        "reconstruction": lambda seed: (ReconstructionMethod().choose(task, target, seed), {}),
        "l2-uniform": lambda seed: (CriterionMethod("l2", "uniform", seen).choose(task, target, seed), {}),
    }
    for seed in options.seeds:
        for name, choose in chosen.items():
            row = found["rows"].setdefault(f"{name}, seed {seed}", {})
            if "shape" not in row:
                started = time.process_time()
                masks, facts = choose(seed)
                row |= {"shape": shape_of(task, masks), "facts": facts, "seconds": time.process_time() - started}
            elif "trained" not in row:
                masks = masks_of(task, row)
            options.json.write_text(json.dumps(found, indent=1) + "\n")
            if "trained" not in row:
                same = (
                    each for each in found["rows"].values() if each.get("shape") == row["shape"] and "trained" in each
                )
                row |= next(({key: each[key] for key in ("repaired", "trained", "report")} for each in same), {})
            if "trained" not in row:
                row |= tuned(one_shot, masks, seed, options)
            options.json.write_text(json.dumps(found, indent=1) + "\n")
            print(name, seed, {key: row[key] for key in ("seconds", "repaired", "trained", "report")}, flush=True)


if __name__ == "__main__":
    main()
