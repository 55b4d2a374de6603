"""Everything that wants a GPU, in one command and under fifteen minutes: training, searches, sizes, profiles.

    python benchmarks/gpu.py --data cifar10.npz --checkpoints DIR [--before FOLDER] [--only training search]
    make benchmark-gpu DATA=cifar10.npz CHECKPOINTS=DIR BEFORE=FOLDER

`DIR` holds resnet56-a.th; without data and checkpoints only what needs neither is run. `--before` is a folder with an
earlier `keepdrop`, as in network_search.py. Stages come in the order of their worth, each is ended at its own limit,
and what it has found by then lies in `--out`: the benchmarks write after every row, this script after every stage.
Called again, it runs what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEEPDROP = Path(sys.executable).with_name("keepdrop")
COMPILED = ("resnet56/128/teacher/bfloat16", "resnet20/128/teacher/bfloat16")  # rows that may take a minute to compile
BUDGET = 870  # seconds of all stages


@dataclass(frozen=True)
class Stage:
    """A command, the seconds after which it is ended, and whether it reads CIFAR-10 and the checkpoint."""

    name: str
    command: list[str]
    limit: int
    reads: bool = True


def stages(options: argparse.Namespace) -> list[Stage]:
    """All of them, the most wanted first."""
    out, before = options.out, [] if options.before is None else ["--before", str(options.before)]
    data, checkpoint = str(options.data), str((options.checkpoints or Path()) / "resnet56-a.th")
    cuda, resnet56 = ["--device", "cuda"], ["network=resnet56", f"checkpoint={checkpoint}", "device=cuda"]
    training = [*cuda, "--seconds", "280", "--compiled", *COMPILED, *before, "--json", f"{out}/training_gpu.json"]
    search = [*cuda, "--depth", "56", "--masks", "16", *before, "--json", f"{out}/network_search_gpu.json"]
    layers = ["experiment=resnet20_cifar10", f"data.path={data}", "recovery.train.epochs=0", "finetune.epochs=0"]
    profile = ["input_shape=[3,32,32]", "runtimes=[eager,cuda-graphs]", "batch_sizes=[1,64]", "samples=20"]
    return [
        Stage("training", [*script("training"), *training], 390, reads=False),
        Stage("search", [*script("network_search"), "--data", data, "--checkpoint", checkpoint, *search], 150),
        Stage(
            "layers", [str(KEEPDROP), "prune", *layers, *resnet56, f"run_dir={out}/layers_gpu_{int(time.time())}"], 90
        ),
        Stage("sizes", [*script("sizes"), *cuda, "--json", f"{out}/sizes_gpu.json"], 160, reads=False),
        Stage("profile", [str(KEEPDROP), "profile", *profile, *resnet56, f"out={out}/profile_gpu.json"], 70),
    ]


def script(name: str) -> list[str]:
    """A benchmark beside this one."""
    return [sys.executable, str(ROOT / "benchmarks" / f"{name}.py")]


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seconds", type=float, default=BUDGET)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="only say what would be run")
    options = parser.parse_args()
    for name in ("data", "checkpoints", "before", "out"):
        given = getattr(options, name)
        setattr(options, name, None if given is None else given.resolve())
    options.out.mkdir(parents=True, exist_ok=True)
    path, began = options.out / "gpu.json", time.perf_counter()
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for stage in stages(options):
        if options.only and stage.name not in options.only:
            continue
        left = options.seconds - (time.perf_counter() - began)
        why = obstacle(stage, options, found, left)
        print(f"{stage.name}: {why or ' '.join(stage.command)}", flush=True)
        if not why and not options.dry:
            found[stage.name] = ran(stage, min(left, stage.limit), options.out)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(json.dumps(found[stage.name]), flush=True)


def obstacle(stage: Stage, options: argparse.Namespace, found: dict[str, Any], left: float) -> str:
    """Why a stage is not run; "" where it is."""
    if found.get(stage.name, {}).get("code") == 0:
        return "done before"
    if stage.reads and (options.data is None or options.checkpoints is None):
        return "left out, it needs --data and --checkpoints"
    return "left out, no time is left" if left < 20 else ""


def ran(stage: Stage, seconds: float, out: Path) -> dict[str, Any]:
    """Its exit code (None: ended at its limit, with all it started), seconds on the clock, and where its log is."""
    began, log = time.perf_counter(), out / f"{stage.name}_gpu.log"
    with log.open("w") as file:
        process = subprocess.Popen(stage.command, stdout=file, stderr=file, cwd=ROOT, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    return {"code": code, "seconds": round(time.perf_counter() - began, 1), "log": log.name}


if __name__ == "__main__":
    main()
