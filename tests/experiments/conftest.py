import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import run_main

BASE = ["base.epochs=2", "base.lr=0.05"]
TINY = [
    "layers=[conv1,conv2]",
    "agent.updates=2",
    "search.masks=4",
    "search.images=60",
    "recovery.train.epochs=0.3",
    "finetune.epochs=0.5",
    "drop_bound=0.2",
    "latency.repeats=1",
    "latency.warmup=0",
    "evaluation.compensation_images=100",
    "evaluation.statistics_images=100",
]


@pytest.fixture(scope="session")
def tiny():
    """Overrides that make `keepdrop prune` a matter of seconds, beside a checkpoint."""
    return list(TINY)


@pytest.fixture(scope="session")
def tiny_base(tiny):
    """The same with a base network that is trained first."""
    return [*BASE, *tiny]


@pytest.fixture
def keepdrop(tmp_path, monkeypatch, capsys):
    """Runs a command line in an empty folder; the result has code, out and err."""
    monkeypatch.chdir(tmp_path)
    # Whatever runs the tests may say how wide its own terminal is.
    monkeypatch.delenv("COLUMNS", raising=False)

    def command(*arguments):
        capsys.readouterr()
        code = run_main(*arguments)
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return command


@pytest.fixture
def refused(keepdrop, tmp_path):
    """Runs a command line that must be refused: exit code 2, one line on stderr, nothing written. Returns the line."""

    def content():
        return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(tmp_path.rglob("*"))}

    def command(*arguments):
        before = content()
        result = keepdrop(*arguments)
        assert result.code == 2, result
        assert result.out == ""
        assert result.err.startswith("keepdrop: ") and result.err.count("\n") == 1, result.err
        assert content() == before
        return result.err.removeprefix("keepdrop: ").strip()

    return command


@pytest.fixture(scope="session")
def cnn(tmp_path_factory):
    """Run folder of a `keepdrop train-cnn`."""
    folder = tmp_path_factory.mktemp("base") / "cnn"
    assert run_main("train-cnn", "base.epochs=2", "base.lr=0.05", f"run_dir={folder}", "quiet=true") == 0
    return folder


@pytest.fixture(scope="session")
def checkpoint(cnn):
    """Weights of a trained small CNN."""
    return cnn / "model.safetensors"


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_base):
    """Run folder of a whole, tiny `keepdrop prune` with seed 0, base training and all."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_main("prune", *tiny_base, f"run_dir={folder}", "quiet=true") == 0
    return folder


@pytest.fixture(scope="session")
def spawn():
    """Starts `keepdrop ...` as a process of its own; returns the Popen object."""

    def start(*arguments, cwd):
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("keepdrop")), *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that runs the tests in the background has them ignore Ctrl-C, and they would pass that on.
            preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None,
        )

    return start


@pytest.fixture
def points(tmp_path):
    """Overrides of a regression in `tmp_path`: where a point is (row, column), which does not move with the image."""
    rng = np.random.default_rng(0)
    places = rng.integers(0, 8, (300, 2))
    pixels = 0.1 * rng.random((300, 1, 8, 8)).astype(np.float32)
    pixels[np.arange(300), 0, places[:, 0], places[:, 1]] = 1
    values = places.astype(np.float32) / 8
    parts = {"train": slice(200), "test": slice(200, 300)}
    arrays = {
        f"{key}_{part}": each[rows] for part, rows in parts.items() for key, each in (("x", pixels), ("y", values))
    }
    np.savez(tmp_path / "points.npz", **arrays)
    (tmp_path / "points.py").write_text(
        "from torch import nn\n"
        "def network():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2))\n"
    )
    own = ["network=custom", "network._target_=points.network", "data=npz", "data.path=points.npz"]
    return [*own, "metric=closeness", "split.reward_size=40"]


def decisions(run):
    """What every layer of a run keeps, by the layer's folder."""
    import json

    return {
        path.parent.name: json.loads(path.read_text())["keep"]
        for path in sorted(Path(run).glob("layers/*/decision.json"))
    }


@pytest.fixture(scope="session")
def outcome():
    """All that two equal runs must share, bit by bit: decisions, agents' and networks' weights."""

    def of(run):
        weights = {
            str(path.relative_to(run)): path.read_bytes()
            for name in ("base/model", "layers/*/network", "finetune/model", "pruned/model")
            for path in sorted(Path(run).glob(f"{name}.safetensors"))
        }
        return decisions(run), weights

    return of
