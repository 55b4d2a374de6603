"""Processes that share a comparison: equal results, errors in one sentence, Ctrl-C and kill -9."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from command_line import run_main

QUICK = [
    "layers=[conv2,conv3]",
    "targets.removed=[0.5]",
    "seeds=[0,1]",
    "evaluation.statistics_images=60",
    "repair.images=40",
    "repair.places=4",
    "network_search.masks=4",
    "network_search.images=60",
    "network_search.agent.updates=2",
    "methods=[agent,l1-uniform,fpgm-at-agent,random-best]",
    "stages=[zero,one]",
    "finetune.epochs=0.3",
    "quiet=true",
]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc")


def results(folder):
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    for row in rows:
        row.pop("choice_seconds")
    return rows


def children(parent):
    """Ids of the processes that `parent` started and that do its jobs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            mother = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_text()
        except OSError:  # ended meanwhile
            continue
        if mother == parent and "loky" in command and "tracker" not in command:
            found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory, checkpoint):
    """Run folder of a comparison in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert run_main("compare", *QUICK, "workers=1", f"checkpoint={checkpoint}", f"run_dir={folder}") == 0
    return folder


@pytest.fixture
def begun(spawn, tmp_path, checkpoint):
    """A comparison in two processes of its own, once both of them are at work."""
    process = spawn("compare", *QUICK, "workers=2", f"checkpoint={checkpoint}", "run_dir=run", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/choices/**/*.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("n_workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_finds_the_same(alone, keepdrop, tmp_path, checkpoint, n_workers):
    result = keepdrop("compare", *QUICK, f"workers={n_workers}", f"checkpoint={checkpoint}", "run_dir=run")
    assert result.code == 0, result.err
    assert results(tmp_path / "run") == results(alone)
    assert children(os.getpid()) == []


def test_processes_augment_as_it_was_asked_for(points, keepdrop, spawn, tmp_path):
    """A default would be left out for coordinates; processes have no command line to see that it is none."""
    asked = [*points, "metric.scale=0.3", "base.epochs=30", "base.lr=0.05", "augment=shift", "finetune.epochs=1"]
    asked += [
        "stages=[one]",
        "targets.removed=[0.5]",
        "seeds=[0]",
        "methods=[l1-uniform,l2-uniform]",
        "compensate=[false]",
    ]
    assert keepdrop("compare", *asked, "quiet=true", "workers=1", "run_dir=alone").code == 0
    together = spawn("compare", *asked, "quiet=true", "workers=2", "run_dir=together", cwd=tmp_path)
    out, err = together.communicate(timeout=120)
    assert together.returncode == 0 and "Notice" not in err and "left out" not in err, (out, err)
    assert results(tmp_path / "together") == results(tmp_path / "alone")


def test_an_error_of_a_process_is_one_sentence(keepdrop, checkpoint):
    command = ["workers=2", f"checkpoint={checkpoint}", "finetune.lr=1e6", "finetune.epochs=1"]
    result = keepdrop("compare", *QUICK, *command, "run_dir=run")
    assert result.code == 2 and result.err.count("\n") == 1
    assert result.err.startswith("keepdrop: Training diverged in epoch 1: ")
    assert children(os.getpid()) == []


@linux
def test_killed_process_is_said_and_the_run_resumed(alone, begun, keepdrop, tmp_path):
    victim = children(begun.pid)[0]
    os.kill(victim, signal.SIGKILL)
    out, err = begun.communicate(timeout=60)
    assert begun.returncode == 2, (out, err)
    assert err == (
        "keepdrop: A process of the comparison was killed, perhaps because memory ran out; what is finished is kept: "
        "continue with resume=run.\n"
    )
    assert keepdrop("compare", "resume=run", "quiet=true").code == 0
    assert results(tmp_path / "run") == results(alone)


@linux
def test_ctrl_c_ends_all_processes(begun):
    """As a terminal sends it: to every process."""
    processes = [begun.pid, *children(begun.pid)]
    assert len(processes) == 3
    for process in processes:
        os.kill(process, signal.SIGINT)
    out, err = begun.communicate(timeout=60)
    assert begun.returncode == 130 and out == "" and err.endswith("Continue with: keepdrop compare resume=run\n"), err
    assert "Traceback" not in err
    assert not [process for process in processes if Path(f"/proc/{process}").exists()]
