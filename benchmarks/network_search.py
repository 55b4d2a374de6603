"""Masks of a network search, and how long they take: this code against an earlier one, in turns, on the same masks.

    python benchmarks/network_search.py --data cifar10.npz --checkpoint resnet20.th [--before FOLDER] [--device cuda]

`--before` is a folder that holds an earlier `keepdrop` package (agent, envs, rewards, experiments and conf copied into
`FOLDER/keepdrop` beside the files of `keepdrop/`). Each code runs in a process of its own, which stays; they take turns
on the masks of one update (`--masks`, cut to half of the MACs, repaired as in a search, counted on 300 images). What
each mask gets right is compared. Medians over `--rounds` of seconds on the clock and of the processor, and of their
ratio. The result is written after every round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/network_search.json"
IMAGES = 300


def main() -> None:
    """Measure and write, or be one of the two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--masks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    serve(options) if options.serve else compare(options)


def compare(options: argparse.Namespace) -> None:
    """Both codes in turns."""
    from common import machine

    codes = {"now": None} | ({} if options.before is None else {"before": options.before})
    processes = {name: started(options, path) for name, path in codes.items()}
    found: dict[str, Any] = {"machine": machine(options.device), "masks": options.masks, "rounds": []}
    found |= {"network": f"resnet{options.depth}", "images": IMAGES, "threads": options.threads}
    for number in range(options.rounds):
        turns = {name: asked(process, number) for name, process in processes.items()}
        found["rounds"].append(turns)
        found["medians"] = medians(found["rounds"])
        found["load"] = os.getloadavg()[0]
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found["medians"]), flush=True)
    for process in processes.values():
        process.stdin.close()
        process.wait()


def started(options: argparse.Namespace, path: Path | None) -> subprocess.Popen[str]:
    """A process with one of the codes, ready."""
    command = [sys.executable, __file__, "--serve", *sys.argv[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    asked(process, -1)  # warm
    return process


def asked(process: subprocess.Popen[str], number: int) -> dict[str, Any]:
    """What the process finds for the masks of a round."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{number}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise SystemExit("the process ended")


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds per mask, ratios, and how many masks got another number of answers right."""
    found: dict[str, Any] = {}
    for kind in ("wall", "processor"):
        for name in rounds[0]:
            found[f"{name}_{kind}"] = statistics.median(turn[name][kind] for turn in rounds)
        if "before" in rounds[0]:
            found[f"ratio_{kind}"] = statistics.median(turn["before"][kind] / turn["now"][kind] for turn in rounds)
    if "before" in rounds[0]:
        pairs = [pair for turn in rounds for pair in zip(turn["now"]["right"], turn["before"]["right"], strict=True)]
        found["masks_compared"], found["masks_apart"] = len(pairs), sum(a != b for a, b in pairs)
    return found


def serve(options: argparse.Namespace) -> None:
    """Evaluate the masks of each round whose number comes in."""
    torch.set_num_threads(options.threads)
    from common import make_task
    from keepdrop.envs.one_shot import OneShotTask
    from keepdrop.envs.repair.reconstruction import ReconstructionSettings
    from keepdrop.envs.surgery.targets import Target
    from keepdrop.experiments.pruning.network_search import NetworkSearchSettings, projection

    task = make_task(options.data, options.checkpoint, ["layer*.conv1"], options.depth, options.device)
    one_shot = OneShotTask(task, NetworkSearchSettings().rough(ReconstructionSettings()))
    project = projection(one_shot, Target(0.5, "network"))
    for line in sys.stdin:
        generator = torch.Generator().manual_seed(int(line) + 1)
        masks = [project(torch.randn(one_shot.n_filters, generator=generator)) for _ in range(options.masks)]
        images = torch.randperm(one_shot.n_images, generator=generator)[:IMAGES]
        wall, processor = time.perf_counter(), time.process_time()
        outcomes = one_shot.outcomes(torch.stack(masks), images)
        print(
            json.dumps(
                {
                    "wall": (time.perf_counter() - wall) / len(masks),
                    "processor": (time.process_time() - processor) / len(masks),
                    "right": [round(outcome.pruned_accuracy * IMAGES) for outcome in outcomes],
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
