"""What foresees the accuracy after training: allocations of a ResNet-20, judged at every price up to a full schedule.

    python benchmarks/foresight.py --data cifar10.npz --checkpoint resnet20.th [--removed 0.5 0.7] [--device cuda]

Allocations that differ (criteria, uniform and global, the `reconstruction` criterion, the network's agent, random ones)
meet the same share of the network's MACs. Each is cut, repaired in closed form, and trained for 25, 100 and 400
minibatches and for the full schedule, every training from the repaired network with a schedule of its own. All
accuracies and losses are of the reward split: what a search could see. Writes after every figure and continues from
what it finds; `--stages` and `--only` divide the work. `benchmarks/plot_foresight.py` makes the table and the plot.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine, make_task, opened
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.cutoff import keep_best, spread_evenly
from keepdrop.envs.surgery.group_cost import pruned_cost
from keepdrop.envs.surgery.targets import Target
from keepdrop.envs.task import PruningTask
from keepdrop.experiments.compare.methods import (
    CriterionMethod,
    Masks,
    Observations,
    ReconstructionMethod,
)
from keepdrop.experiments.pruning.network_search import NetworkAgent, NetworkSearchSettings
from keepdrop.experiments.runs.seeds import derive_seed
from keepdrop.experiments.training.augment import RandomCropFlip
from keepdrop.experiments.training.loop import TrainSettings, fit_network
from torch import nn

RESULTS = Path(__file__).parents[1] / "benchmarks/results/foresight.json"
CRITERIA = ("l1", "l2", "mean_activation", "apoz", "taylor")
RANDOM = 10
SHORT = (25, 100, 400)  # minibatches
Choose = Callable[[], Masks]


def allocations(task: PruningTask, one_shot: OneShotTask, target: Target) -> Iterator[tuple[str, Choose]]:
    """Every allocation by name, chosen when it is asked for."""
    seen = Observations()
    methods: list[Any] = [CriterionMethod(name, how, seen) for how in ("uniform", "global") for name in CRITERIA]
    methods += [CriterionMethod(name, "global-mean", seen) for name in ("l1", "taylor")]
    methods += [CriterionMethod("random", "uniform", seen), ReconstructionMethod()]
    for method in methods:
        yield method.name, lambda method=method: method.choose(task, target, 0)
    for number in range(RANDOM):
        yield f"random widths {number}", lambda number=number: random_widths(task, seen, target, number)
    agent = NetworkAgent(NetworkSearchSettings(), one_shot)
    yield "agent", lambda: agent.choose(target, 0)


def random_widths(task: PruningTask, seen: Observations, target: Target, number: int) -> Masks:
    """The largest filters by l2 norm, of each layer a random share between a fifth and all of the others'."""
    generator = torch.Generator().manual_seed(derive_seed(number, "widths"))
    ranking = {}
    for name, observation in seen.of(task).items():
        share = 0.2 + 0.8 * float(torch.rand((), generator=generator))
        ranking[name] = spread_evenly(observation["weights"].square().sum(1), share)
    return keep_best(task.constraints(target), ranking)


@torch.no_grad()
def judged(model: nn.Module, task: PruningTask, batch: int = 500) -> dict[str, float]:
    """Accuracy and cross-entropy on the reward split."""
    model.eval()
    images, labels = task.reward_images
    outputs = torch.cat([model(part) for part in images.split(batch)]).float()
    loss = torch.nn.functional.cross_entropy(outputs, labels)
    return {"accuracy": float((outputs.argmax(1) == labels).float().mean()), "loss": float(loss)}


def shape_of(task: PruningTask, masks: Masks) -> dict[str, Any]:
    """What an allocation looks like: kept filters, MACs and parameters, its narrowest layer, where its cuts lie."""
    counts = {group: int(masks[group.name].sum()) for group in task.groups}
    macs, params = pruned_cost(task.model, task.cost, counts)
    kept = [count / group.n_filters for group, count in counts.items()]
    gone = [1 - each for each in kept]
    depth = sum(place * each for place, each in enumerate(gone)) / max(sum(gone), 1e-9) / max(len(gone) - 1, 1)
    return {
        "kept": {group.name: masks[group.name].nonzero().flatten().tolist() for group in task.groups},
        "macs": macs,
        "params": params,
        "narrowest": min(kept),
        "mean_depth_of_cuts": depth,
    }


def trained(model: nn.Module, task: PruningTask, epochs: float, options: argparse.Namespace) -> nn.Module:
    """A trained copy, under the recipe of the comparison presets."""
    model = copy.deepcopy(model)
    settings = TrainSettings(epochs=epochs, batch_size=128, lr=0.02, distill_weight=0.9)
    fit_network(
        model,
        task.splits.fit,
        settings,
        seed=derive_seed(options.seed, "finetune"),
        augment=RandomCropFlip(),
        teacher=task.model,
        device=options.device,
    )
    return model


def masks_of(task: PruningTask, row: dict[str, Any]) -> Masks:
    """The masks of a row that was chosen before."""
    masks = {group.name: torch.zeros(group.n_filters, dtype=torch.bool) for group in task.groups}
    for name, kept in row["shape"]["kept"].items():
        masks[name][kept] = True
    return masks


def measure(row: dict[str, Any], stage: str, one_shot: OneShotTask, options: argparse.Namespace) -> dict[str, float]:
    """One figure of one row."""
    task, keep = one_shot.task, one_shot.joined(masks_of(one_shot.task, row))
    started = time.perf_counter()
    if stage == "cut":
        model = one_shot.with_repair(None).cut(keep)
    else:
        model = one_shot.cut(keep)
        steps_per_epoch = -(-len(task.splits.fit) // 128)
        epochs = {str(steps): steps / steps_per_epoch for steps in SHORT} | {"repaired": 0.0, "full": options.epochs}
        if epochs[stage]:
            model = trained(model, task, epochs[stage], options)
    return {**judged(model, task), "seconds": time.perf_counter() - started}


def main() -> None:
    """Run and write."""
    stages = ["cut", "repaired", *map(str, SHORT), "full"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--removed", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--epochs", type=float, default=10, help="of the full schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", default=stages, choices=stages)
    parser.add_argument("--only", nargs="+", help="names of allocations")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    task = make_task(options.data, options.checkpoint, ["layer*.conv1"], options.depth, options.device)
    one_shot = OneShotTask(task, ReconstructionSettings(images=1000))
    about = {"network": f"resnet{options.depth}", "epochs": options.epochs, "seed": options.seed}
    found = opened(options.json, about, "rows")
    found.setdefault("machine", machine(options.device))
    found["dense"] = judged(task.model, task)

    def save() -> None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")

    for removed in options.removed:
        for name, choose in allocations(task, one_shot, Target(removed, "network")):
            row = found["rows"].setdefault(f"{name} {removed:g}", {"allocation": name, "removed": removed})
            if "shape" not in row and (options.only is None or name in options.only):
                started = time.perf_counter()
                row["shape"] = shape_of(task, choose())
                row["seconds_to_choose"] = time.perf_counter() - started
                save()
    for stage in options.stages:
        for row in found["rows"].values():
            wanted = "shape" in row and row["removed"] in options.removed
            if stage not in row and wanted and (options.only is None or row["allocation"] in options.only):
                row[stage] = measure(row, stage, one_shot, options)
                save()
                print(row["allocation"], row["removed"], stage, row[stage], flush=True)


if __name__ == "__main__":
    main()
