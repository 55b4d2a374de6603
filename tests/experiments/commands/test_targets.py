"""Targets of time, parameters and bytes from the command line: met, said, applied, resumed, and what is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from keepdrop.agent.saved_agent import load_agent
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.surgery.latency_profile import save_profile
from keepdrop.experiments.deploy import profiling
from stepped_meter import stepped_profile

QUICK = [
    "network_search.masks=4",
    "network_search.images=60",
    "network_search.agent.updates=1",
    "repair.images=100",
    "repair.places=8",
    "recovery.train.epochs=0",
    "finetune.epochs=0",
    "latency.repeats=1",
    "latency.warmup=0",
    "evaluation.statistics_images=60",
    "controls=[]",
]
BOTH = ["target.latency=0.6", "target.params=0.5", "profile.file=device.json", "surgery.round_to=auto"]


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def device(tmp_path):
    """A made-up device, as a file in the working directory: every 8 channels of a layer cost the same."""
    save_profile(stepped_profile(small_cnn().eval(), torch.zeros(1, 1, 8, 8)), tmp_path / "device.json")


def test_time_and_parameters_hold_at_once(keepdrop, checkpoint, tmp_path, device):
    result = keepdrop("prune", *QUICK, *BOTH, f"checkpoint={checkpoint}", "run_dir=run")
    assert result.code == 0, result.err
    metrics = read(tmp_path / "run/metrics.json")
    time, params = metrics["target"]
    assert time["resource"] == "latency" and time["pruned"] <= 0.6 * time["dense"] * (1 + 1e-9)
    assert "eager, batch 1" in time["conditions"]
    assert params["pruned"] == pytest.approx(metrics["pruned_params"]) and params["pruned"] <= 0.5 * params["dense"]
    assert result.out.count(" layers at once: kept ") == 1 and "[1/" not in result.out
    assert "Target latency=0.6:" in result.out and "Target params=0.5:" in (tmp_path / "run/report.md").read_text()
    # The widths are those of the device's steps.
    assert all(group["n_kept"] % 8 == 0 for group in metrics["groups"])
    assert load_agent(tmp_path / "run/network/agent").facts["target"] == {"latency": 0.6, "params": 0.5}
    # Another network of the architecture, asked by the times that the run kept, and for less.
    (tmp_path / "device.json").unlink()
    ask = ["apply", "agents=run", f"checkpoint={checkpoint}", "controls=[]", "finetune_controls=false"]
    applied = keepdrop(*ask, "profile.file=null", "surgery.round_to=1", "target.latency=0.8", "run_dir=applied")
    assert applied.code == 2 and "finetune_controls would do nothing" in applied.err
    assert keepdrop(*ask[:4], "profile.file=null", "surgery.round_to=1", "run_dir=applied").code == 0
    rows = read(tmp_path / "applied/metrics.json")["target"]
    assert [row["pruned"] <= row["asked"] * row["dense"] * (1 + 1e-9) for row in rows] == [True, True]


def test_a_target_of_time_decides_on_all_layers_whatever_the_experiment_prunes(keepdrop, checkpoint, tmp_path, device):
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text("# @package _global_\nlayers: [conv1, conv2]\n")
    ask = ["prune", "--config-dir", "own", "experiment=mine", *QUICK, f"checkpoint={checkpoint}"]
    timed = [*ask, "target.latency=0.95", "profile.file=device.json"]
    all_layers = keepdrop(*timed, "run_dir=all")
    assert all_layers.code == 0 and "target.latency decides on every layer that can be pruned" in all_layers.err
    assert "layers=['conv1','conv2']" in all_layers.err and len(read(tmp_path / "all/metrics.json")["groups"]) == 5
    some = keepdrop(*timed, "layers=['conv1','conv2']", "run_dir=some")
    assert some.code == 0 and "every layer" not in some.err, some.err
    assert len(read(tmp_path / "some/metrics.json")["groups"]) == 2
    macs = keepdrop(*ask, "target.removed=0.2", "run_dir=macs")
    assert macs.code == 0 and len(read(tmp_path / "macs/metrics.json")["groups"]) == 2


def test_a_target_that_cannot_be_met_keeps_the_times(keepdrop, checkpoint, tmp_path, monkeypatch):
    """They lie in the folder of what is kept between commands, named in the sentence; the next command reads them."""
    timed = []
    monkeypatch.setattr(profiling, "LEAST_SECONDS", 0)
    monkeypatch.setattr(profiling, "FEWEST", 10)
    monkeypatch.setattr(profiling, "PER_KIND", 0)
    monkeypatch.setattr(profiling, "one_turn", lambda run, inputs, device: timed.append(1) or 1e-3)
    ask = ["prune", *QUICK, f"checkpoint={checkpoint}", "run_dir=run"]
    result = keepdrop(*ask, "target.latency=0.5")
    kept = list(Path(os.environ["KEEPDROP_CACHE"], "profiles").iterdir())
    assert result.code == 2 and len(kept) == 1 and not (tmp_path / "run").exists()
    assert "target.latency=0.5 cannot be met: with one filter per layer" in result.err
    assert result.err.endswith(
        f"The times that were measured are kept in {str(kept[0])!r}, and the next command goes by them.\n"
    )
    before = len(timed)
    assert before > 0
    again = keepdrop(*ask, "target.latency=0.6")
    assert again.code == 2 and f"Times are those of {str(kept[0])!r}" in again.err and len(timed) == before
    assert "cannot be met" in again.err and "goes by them" not in again.err


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["target.latency=60"], "target.latency is 60; expected the fraction of the dense network's time"),
        (["target.latency=0.05"], "target.latency=0.05 cannot be met: with one filter per layer"),
        (["target.milliseconds=1000"], "would remove nothing: the dense network has"),
        (
            ["target.params=0.2", "surgery.min_kept=0.9", "profile.file=null"],
            "target.params=0.2 cannot be met: under surgery.round_to",
        ),
        (
            ["target.removed=0.5", "surgery.round_to=auto", "profile.file=null"],
            "round_to=auto takes the multiple that a profile",
        ),
        (["surgery.round_to=even"], "surgery.round_to is even; expected a number of channels, 1 or more, or auto"),
        (["target.params=0.5", "target.of=groups"], "it says whose MACs target.removed counts"),
        (["target.params=0.5"], "profile.file would do nothing: nothing goes by time here"),
        (["target.latency=0.6", "profile.runtime=compile"], "holds eager at batch 1, not compile"),
        (["target.latency=0.6", "profile.file=nowhere.json"], "There is no latency profile 'nowhere.json'"),
        (["target.latency=0.6", "network.widths=[8,8,8,8,8]"], "belongs to another network"),
    ],
)
def test_what_makes_no_sense_is_one_sentence_before_the_search(keepdrop, tmp_path, device, settings, sentence):
    given = [] if any(each.startswith("profile.file") for each in settings) else ["profile.file=device.json"]
    typed = [each for each in settings if each != "profile.file=null"]  # the default, which is refused as idle if typed
    result = keepdrop("prune", *QUICK[:2], *given, *typed, "run_dir=run")
    assert result.code == 2 and sentence in result.err, result.err
    assert not (tmp_path / "run").exists()
