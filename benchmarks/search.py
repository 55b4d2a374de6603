"""How the time of a search grows with groups, filters, masks and images, layer by layer and for a whole network.

    OMP_NUM_THREADS=1 python benchmarks/search.py
    python benchmarks/plot_search.py benchmarks/results/search.json --out docs/assets/search.svg

A CIFAR ResNet on images of 16 x 16 pixels, random weights and labels. One of the four is varied at a time, the others
stay at the base point. Layer by layer: an agent for each first convolution of a block, evaluated with compensation
(`train_on_layer`), nothing cut in between. Whole: one agent for all of them, every mask cut and repaired for real
(`NetworkAgent`, 30 % of the MACs). Both make `UPDATES` updates, in which time is linear, with the default
settings otherwise. All points take turns, the median over rounds counts; processor time of the thread beside wall-clock
time. Finding the groups and counting the base are not part of it. Continues with what the file already holds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import opened, random_task
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings
from keepdrop.agent.learning.trainer import AgentSettings
from keepdrop.agent.policies.set_policy import SetPolicy
from keepdrop.envs.networks.built_in import cifar_resnet
from keepdrop.envs.observation import STATISTIC_NAMES
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.targets import Target
from keepdrop.envs.task import PruningTask
from keepdrop.experiments.pruning.network_search import NetworkAgent, NetworkSearchSettings
from keepdrop.experiments.pruning.search import train_on_layer
from keepdrop.rewards.try_and_learn import TryAndLearn

RESULTS = Path(__file__).parent / "results" / "search.json"
BASE = {"groups": 6, "filters": 8, "masks": 8, "images": 125}
SWEEPS = {"groups": (3, 6, 12), "filters": (4, 8, 16, 32), "masks": (4, 8, 16, 32), "images": (60, 125, 250, 500)}
KINDS = ("layers", "network")
UPDATES = 4


def main() -> None:
    """Measure what is missing, round by round, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = opened(options.json, {"base": BASE, "updates": UPDATES, "threads": torch.get_num_threads()}, "cells")
    for turn in range(options.rounds):
        for kind, point in points():
            runs = found["cells"].setdefault(cell(kind, point), [])
            if len(runs) <= turn:
                runs.append(timed(kind, point, turn))
                found["load"] = os.getloadavg()[1]
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    found["sweeps"] = {kind: {axis: medians(found["cells"], kind, axis) for axis in SWEEPS} for kind in KINDS}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["sweeps"], indent=1))


def points() -> list[tuple[str, dict[str, int]]]:
    """Every point of every sweep once, for both kinds of search."""
    found = {cell(kind, BASE | {axis: value}): (kind, BASE | {axis: value})
             for kind in KINDS for axis, values in SWEEPS.items() for value in values}  # fmt: skip
    return list(found.values())


def cell(kind: str, point: dict[str, int]) -> str:
    """Its key in the file."""
    return "/".join([kind, *(f"{axis}={value}" for axis, value in point.items())])


def timed(kind: str, point: dict[str, int], seed: int) -> dict[str, float]:
    """Seconds of one search."""
    task = make_task(point)
    wall, thread = time.perf_counter(), time.thread_time()
    (by_layers if kind == "layers" else whole)(task, point, seed)
    spent = {"thread_seconds": time.thread_time() - thread, "wall_seconds": time.perf_counter() - wall}
    print(cell(kind, point), spent, flush=True)
    return {name: round(value, 3) for name, value in spent.items()}


def make_task(point: dict[str, int]) -> PruningTask:
    """A network of that many blocks and filters, and images."""
    torch.manual_seed(0)
    width = point["filters"]
    model = cifar_resnet(2 * point["groups"] + 2, widths=(width, 2 * width, 4 * width)).eval()
    task = random_task(model, 16, (1100, 1500), "test", 1000, ["layer*.conv1"])
    assert len(task.groups) == point["groups"] and task.cost and len(task.reward_images[0]) == 1000
    return task


def by_layers(task: PruningTask, point: dict[str, int], seed: int) -> None:
    """One agent per group."""
    settings = AgentSettings(updates=UPDATES, patience=None)
    for group in task.groups:
        policy = SetPolicy(len(STATISTIC_NAMES), warm_start="taylor", statistic_names=STATISTIC_NAMES, seed=seed)
        how: dict[str, Any] = {"masks": point["masks"], "images": point["images"], "seed": seed}
        train_on_layer(task.layer(group.name), policy, TryAndLearn(0.05), settings, **how)


def whole(task: PruningTask, point: dict[str, int], seed: int) -> None:
    """One agent for all groups."""
    settings = NetworkSearchSettings(point["masks"], point["images"], agent=NetworkAgentSettings(updates=UPDATES))
    NetworkAgent(settings, OneShotTask(task, ReconstructionSettings())).choose(Target(0.3, "network"), seed)


def medians(cells: dict[str, Any], kind: str, axis: str) -> list[dict[str, float]]:
    """Along one sweep."""
    rows = []
    for value in SWEEPS[axis]:
        runs = cells[cell(kind, BASE | {axis: value})]
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        rows.append({"value": value, **middle, "from": min(r["thread_seconds"] for r in runs),
                     "to": max(r["thread_seconds"] for r in runs)})  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
