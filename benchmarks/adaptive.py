"""What adaptive evaluation saves: the same agents trained with and without it, reward of what they decide in the end.

    OMP_NUM_THREADS=1 python benchmarks/adaptive.py --data cifar10.npz --checkpoint resnet20.th

Full: every mask of an update sees all images of the update, the same ones for all its masks. Adaptive: the same images,
spent chunk by chunk until a mask's rank is settled (`search.adaptive=true`). Fixed: as many images for every mask as
adaptive evaluation spent on the average, drawn afresh; what is left between the two is what stopping early is worth.
Agents, masks, updates and seeds are equal; the greedy decision is judged on the whole reward split. Writes after every
training and goes on with what it finds there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import make_task, opened
from keepdrop.agent.learning.trainer import AgentSettings, Trainer
from keepdrop.agent.policies.set_policy import SetPolicy
from keepdrop.envs.adaptive import AdaptiveSettings
from keepdrop.envs.filter_pruning import FilterPruningVectorEnv
from keepdrop.envs.observation import STATISTIC_NAMES
from keepdrop.envs.task import LayerTask
from keepdrop.rewards.try_and_learn import TryAndLearn

RESULTS = Path(__file__).parent / "results" / "adaptive.json"
ARMS = ("full", "adaptive", "fixed")


def main() -> None:
    """Run what is missing, print it and write it."""
    options = parsed()
    settings = AdaptiveSettings(options.first, options.growth, options.error, options.resolution)
    about = {name: getattr(options, name) for name in ("masks", "images", "updates", "drop_bound")}
    about["adaptive"] = asdict(settings)
    found = opened(options.json, about, "cells")
    for name in options.groups:
        layer = make_task(options.data, options.checkpoint, name)
        for seed in range(options.seeds):
            for arm in options.arms:
                cell = f"{name}/{arm}/{seed}"
                if cell not in found["cells"]:
                    spent = found["cells"].get(f"{name}/adaptive/{seed}", {}).get("mask_images", 0)
                    images = options.images if arm != "fixed" else round(spent / options.masks / options.updates)
                    found["cells"][cell] = train(layer, options, seed, images, settings if arm == "adaptive" else None)
                    options.json.write_text(json.dumps(found, indent=1) + "\n")
                print(cell, found["cells"][cell], flush=True)
    found["summary"] = summary(found["cells"], options)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["summary"], indent=1))


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--groups", nargs="+", default=["layer3.1.conv1", "layer2.1.conv1", "layer1.2.conv1"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--masks", type=int, default=16)
    parser.add_argument("--images", type=int, default=1000, help="of an update")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--drop-bound", type=float, default=0.05)
    for name, value in asdict(AdaptiveSettings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"of AdaptiveSettings, {value}")
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args()


def train(
    layer: LayerTask, options: argparse.Namespace, seed: int, images: int, adaptive: AdaptiveSettings | None
) -> dict[str, Any]:
    """One agent: what it spent, and what its greedy decision is worth on the whole reward split."""
    started = time.thread_time()
    reward = TryAndLearn(options.drop_bound)
    venv = FilterPruningVectorEnv(layer, reward, options.masks, images, adaptive)
    venv.reset(seed=seed)
    policy = SetPolicy(len(STATISTIC_NAMES), warm_start="taylor", statistic_names=STATISTIC_NAMES, seed=seed)
    settings = AgentSettings(updates=options.updates, patience=None, sweep=False)
    trainer = Trainer(venv, policy, settings, torch.Generator().manual_seed(seed))
    while not trainer.done:
        trainer.step()
    seconds = time.thread_time() - started
    greedy = trainer.result().greedy
    looked = layer.n_images if adaptive else 0  # the dense network's margins, one pass through the suffix
    outcome = layer.outcomes(greedy[None])[0]
    return {
        "mask_images": round(sum(step["info/images"] for step in trainer.history) * options.masks) + looked,
        "reward": round(reward(outcome).value, 5),
        "kept": outcome.n_kept,
        "accuracy_drop": round(outcome.accuracy_drop, 5),
        "thread_seconds": round(seconds, 2),
    }


def summary(cells: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """For each group and over all: mask-images of full / those of the other, and mean rewards."""
    rows: dict[str, Any] = {}
    for name in options.groups:
        rows[name] = {arm: means(cells, [name], arm, options.seeds) for arm in options.arms}
    rows["all"] = {arm: means(cells, options.groups, arm, options.seeds) for arm in options.arms}
    return rows


def means(cells: dict[str, Any], groups: list[str], arm: str, seeds: int) -> dict[str, float]:
    """Of one arm, against full evaluation."""
    mine = [cells[f"{name}/{arm}/{seed}"] for name in groups for seed in range(seeds)]
    full = [cells.get(f"{name}/full/{seed}") for name in groups for seed in range(seeds)]
    reward = statistics.mean(cell["reward"] for cell in mine)
    found = {"reward": round(reward, 4)}
    if all(full):
        spent = [sum(cell["mask_images"] for cell in some) for some in (full, mine)]
        found["fewer_mask_images"] = round(spent[0] / spent[1], 2)
        found["reward_over_full"] = round(reward / statistics.mean(cell["reward"] for cell in full), 4)
        found["full_seconds_over"] = round(
            sum(cell["thread_seconds"] for cell in full) / sum(cell["thread_seconds"] for cell in mine), 2
        )
    return found


if __name__ == "__main__":
    main()
