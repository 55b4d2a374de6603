"""The papers' tables at tiny scale: the script of the GPU tables on a narrow ResNet-18, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
ALSO = [
    "network.width=4",
    "split.reward_size=60",
    "base.epochs=3",
    "base.batch_size=32",
    "agent.updates=1",
    "search.masks=4",
    "search.images=60",
    "recovery.train.epochs=0.1",
    "finetune.epochs=0.5",
    "finetune.batch_size=32",
    "minibatches=1",
    "step=12",
    "evaluation.statistics_images=60",
    "latency.repeats=1",
    "latency.warmup=0",
    "latency.batch_sizes=[1]",
    "criteria=[l1,taylor]",
]


def run(folder, *arguments):
    line = [sys.executable, str(ROOT / "benchmarks/cells.py"), *map(str, arguments), "--results", "cells.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def images(tmp_path):
    """Two kinds of 32x32 images that differ in their colour, as `cifar10.npz` would hold them."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 260), ("test", 80)):
        labels = rng.integers(0, 10, n)
        pixels = rng.integers(0, 60, (n, 32, 32, 3)) + 15 * labels[:, None, None, None]
        arrays |= {f"x_{part}": pixels.astype(np.uint8), f"y_{part}": labels.astype(np.int64)}
    np.savez(tmp_path / "c.npz", **arrays)
    return tmp_path


def test_a_table_without_runs_says_so_beside_the_published_figures(tmp_path):
    done = run(tmp_path, "vgg16", "--table")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2].startswith("| vgg16 base |") and "| not run |" in lines[2]
    assert any(line.startswith("| CHIP (published) | theirs | theirs | 67 |") and "93.72" in line for line in lines)
    assert not (tmp_path / "cells.json").exists()


@pytest.mark.slow
def test_the_narrow_table_row_by_row_and_again(images):
    """The first call stops in the middle for want of time, the second ends the table, the third runs nothing."""
    call = ["resnet18-bounds", "--data", "c.npz", "--device", "cpu", "--also", *ALSO]
    first = run(images, *call, "--minutes", 0.2)
    assert first.returncode == 0, first.stderr
    done = run(images, *call, "--minutes", 20)
    assert done.returncode == 0, done.stderr
    results = json.loads((images / "cells.json").read_text())
    names = [f"resnet18 bound {bound} seed 0" for bound in (0.005, 0.01, 0.02)]
    assert list(results) == [
        "resnet18 base",
        *names,
        *(f"resnet18 iterate {n} % seed 0" for n in (50, 70)),
        "resnet18 oracle",
    ]
    for name in names:
        assert results[name]["report_images"] == 80 and 0 <= results[name]["filters_removed"] < 1
        assert results[name]["seconds"] > 0
    assert "not run" not in done.stdout and results["resnet18 oracle"]["correlations"]
    stamps = {path: path.stat().st_mtime_ns for path in (images / "runs").rglob("*")}
    again = run(images, *call).stdout
    assert again.startswith("| row |") and done.stdout.endswith(again)
    assert {path: path.stat().st_mtime_ns for path in (images / "runs").rglob("*")} == stamps
