"""How the time of a search grows with groups, filters, masks and images, layer by layer and for a whole network.

    OMP_NUM_THREADS=1 python benchmarks/search.py
    python benchmarks/plot_search.py benchmarks/results/search.json --out docs/assets/search.svg

A CIFAR ResNet on images of 16 x 16 pixels, random weights and labels. One of the four is varied at a time, the others
stay at the base point. Layer by layer: an agent for each first convolution of a block, evaluated with compensation
(`train_on_layer`), nothing cut in between. Whole: one agent for all of them, every mask cut and repaired for real
(`NetworkAgent`, 30 % of the MACs). Both make `UPDATES` updates, in which time is linear, with the default
settings otherwise. All points take turns, the median over rounds counts; processor time of the thread beside wall-clock
time. Finding the groups and counting the base are not part of it. Continues with what the file already holds.

    OMP_NUM_THREADS=1 python benchmarks/search.py --beside [--depth 56] [--before FOLDER]

What a layer costs beside its masks: the whole schedule of a ResNet's blocks (decide, verify, cut, continue with the
smaller network) with one update of two masks on `FEW` images of 32 x 32 pixels, so that little more than the host's
work is left. `--before` is a folder with an earlier `keepdrop` package, as in `network_search.py`; both codes take
turns in processes of their own, and what they keep is compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
from keepdrop.experiments.pruning.schedule import Schedule
from keepdrop.experiments.pruning.search import train_on_layer
from keepdrop.experiments.runs.folder import RunFolder
from keepdrop.rewards.try_and_learn import TryAndLearn

RESULTS = Path(__file__).parent / "results" / "search.json"
BASE = {"groups": 6, "filters": 8, "masks": 8, "images": 125}
SWEEPS = {"groups": (3, 6, 12), "filters": (4, 8, 16, 32), "masks": (4, 8, 16, 32), "images": (60, 125, 250, 500)}
KINDS = ("layers", "network")
UPDATES = 4
FEW = 24


def main() -> None:
    """Measure what is missing, round by round, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--beside", action="store_true", help="what a layer costs beside its masks")
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(schedule(options.depth)))
        return
    if options.beside:
        beside(options)
        return
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


def beside(options: argparse.Namespace) -> None:
    """Both codes in turns; the file is written after every round."""
    from common import machine

    path = RESULTS.with_name("search_beside.json") if options.json == RESULTS else options.json
    about = {"few": FEW, "threads": torch.get_num_threads()}
    found = opened(path, about, "networks")
    rounds = found["networks"].setdefault(f"resnet{options.depth}", {"rounds": []})
    codes = {"now": None} | ({} if options.before is None else {"before": options.before})
    for _ in range(len(rounds["rounds"]), options.rounds):
        rounds["rounds"].append({name: in_own_process(options.depth, code) for name, code in codes.items()})
        for name in codes:
            rounds[name] = statistics.median(each[name]["processor_seconds"] for each in rounds["rounds"])
        if options.before is not None:
            pairs = [(each["before"], each["now"]) for each in rounds["rounds"]]
            rounds["ratio"] = statistics.median(a["processor_seconds"] / b["processor_seconds"] for a, b in pairs)
            rounds["same_decisions"] = all(a["kept"] == b["kept"] for a, b in pairs)
        found["machine"] = machine()
        path.write_text(json.dumps(found, indent=1) + "\n")
        print({key: value for key, value in rounds.items() if key != "rounds"}, flush=True)


def in_own_process(depth: int, code: Path | None) -> dict[str, Any]:
    """`schedule` with an earlier code, or this one."""
    environment = os.environ | ({} if code is None else {"PYTHONPATH": str(code)})
    command = [sys.executable, __file__, "--one", "--depth", str(depth)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


class Silent:
    """Watches a schedule."""

    def layer_begins(self, *_about: Any) -> None:
        """Nothing."""

    def layer_ends(self, *_about: Any) -> None:
        """Nothing."""


def schedule(depth: int) -> dict[str, Any]:
    """Processor seconds and seconds on the clock per layer, and a digest of what each layer keeps."""
    torch.manual_seed(0)
    task = random_task(cifar_resnet(depth).eval(), 32, (FEW, 2 * FEW), "test", FEW, ["layer*.conv1"])
    assert task.groups and task.cost

    def decide(layer: Any, working: Path, seed: int) -> Any:
        policy = SetPolicy(len(STATISTIC_NAMES), warm_start="taylor", statistic_names=STATISTIC_NAMES, seed=seed)
        settings = AgentSettings(updates=1, patience=None)
        return train_on_layer(layer, policy, TryAndLearn(0.05), settings, masks=2, images=FEW // 2, seed=seed)[1]

    with tempfile.TemporaryDirectory() as place:
        wall, processor = time.perf_counter(), time.process_time()
        records = Schedule(decide, TryAndLearn(0.05), None).run(task, RunFolder(Path(place)), Silent())[2]
        spent = {"processor_seconds": time.process_time() - processor, "wall_seconds": time.perf_counter() - wall}
    kept = json.dumps({record.name: record.keep for record in records}).encode()
    digest = hashlib.sha256(kept).hexdigest()[:16]
    return {**{name: round(value / len(records), 4) for name, value in spent.items()}, "kept": digest}


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
