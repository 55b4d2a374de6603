"""Limits, exports and runtimes through the commands: what was asked for is what the run folder holds."""

import json

import pytest
import torch
from keepdrop.envs.files.pruned_network import load_pruned
from keepdrop.experiments.commands.results import latency_rows, remarks
from keepdrop.experiments.pruning import schedule

LIMITS = ["surgery.round_to=4", "surgery.min_kept=6", "surgery.protect={conv*:[0,15]}"]
SHORT = ["finetune.epochs=0", "recovery.train.epochs=0", "quiet=true"]


def _decisions(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("**/layers/*/decision.json"))]


def test_prune_and_apply_hold_the_limits(keepdrop, tiny, checkpoint, tmp_path):
    command = [*tiny, *SHORT, f"checkpoint={checkpoint}", *LIMITS, "export=[program]", "run_dir=run"]
    assert keepdrop("prune", *command).code == 0
    for decision in _decisions(tmp_path / "run"):
        assert decision["n_kept"] in (8, 12, 16) and decision["keep"][0] and decision["keep"][15]
        # A layer that is kept as it is has nothing to compensate.
        assert bool(decision["facts"]["compensated"]) != all(decision["keep"])
        assert decision["facts"]["not_compensated"] == {}
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    (exported,) = metrics["exports"]
    assert exported["file"] == "pruned/model.pt2" and exported["largest_difference"] <= 1e-4
    program = torch.export.load(tmp_path / "run" / exported["file"]).module()
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(program(images), load_pruned(tmp_path / "run/pruned")(images), atol=1e-5)
    assert "pruned/model.pt2: program" in (tmp_path / "run/report.md").read_text()
    assert keepdrop("apply", "agents=run", f"checkpoint={checkpoint}", "run_dir=applied", *SHORT[2:]).code == 0
    counts = {
        name: [(d["n_kept"], d["keep"][0] and d["keep"][15]) for d in _decisions(tmp_path / "applied/methods" / name)]
        for name in ("agent", "l1", "random")
    }
    assert counts["agent"] == counts["l1"] == counts["random"] and all(held for _, held in counts["agent"])


def test_a_layer_that_can_lose_nothing_is_left_and_named(keepdrop, tiny, checkpoint, tmp_path):
    command = [*tiny, *SHORT, "layers=[conv2,conv3]", f"checkpoint={checkpoint}", "surgery.round_to=16"]
    assert keepdrop("prune", *command, "run_dir=run").code == 0
    first, second = _decisions(tmp_path / "run")
    assert (first["n_kept"], first["decided_by"]) == (16, "surgery limits")
    assert second["n_kept"] in (16, 32) and second["decided_by"] != "surgery limits"


def test_a_cut_network_that_does_not_run_costs_its_layer_only(keepdrop, tiny, checkpoint, tmp_path, monkeypatch):
    prune, seen = schedule.LayerTask.cut, []

    def broken(layer, keep):
        model = prune(layer, keep)
        if layer.group.name == "conv1":
            seen.append(layer)
            model.conv2.weight.data = model.conv2.weight.data[:, :-1]
        return model

    monkeypatch.setattr(schedule.LayerTask, "cut", broken)
    assert keepdrop("prune", *tiny, *SHORT, "controls=[]", f"checkpoint={checkpoint}", "run_dir=run").code == 0
    first, second = _decisions(tmp_path / "run")
    assert seen and all(first["keep"]) and first["decided_by"].startswith("skipped: the cut network does not run (")
    assert not second["decided_by"].startswith("skipped")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("surgery.round_to=0",), "surgery.round_to is 0; expected a number of channels"),
        (("surgery.round_to=64",), "no chosen layer can lose a filter ('conv1' has 16); lower them"),
        (("surgery.min_kept=2.5",), "surgery.min_kept is 2.5"),
        (("surgery.protect={conv9:[0]}",), "No prunable layer is called 'conv9'; the nearest are"),
        (("surgery.protect={conv1:[16]}",), "names filter 16 of 'conv1', which has 16 filters"),
        (("surgery.protect={conv1:x}",), "surgery.protect has conv1: 'x'; expected numbers of filters by layer"),
        (("surgery.protect=[1]",), "surgery.protect is [1]; expected"),
        (("export=[tflite]",), "export has 'tflite'; expected any of onnx, program"),
        (("latency.runtimes=[fast]",), "latency.runtimes has 'fast'; expected any of eager, compile, onnxruntime"),
        (("latency.runtimes=[]",), "latency.runtimes is []; expected at least one"),
        (("evaluation.target=dence",), "evaluation.target is 'dence'; expected one of trained, dense, current"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(refused, checkpoint, settings, sentence):
    assert sentence in refused("prune", f"checkpoint={checkpoint}", *settings)


def _record(model, seconds, runtime="eager", batch=1):
    return {
        "model": model, "batch_size": batch, "median_seconds": seconds, "low_seconds": seconds / 2,
        "high_seconds": seconds * 2, "repeats": 5, "device": "cpu", "n_threads": 2, "runtime": runtime,
    }  # fmt: skip


def test_rows_tell_runtimes_apart():
    latency = [_record("base", 0.004), _record("pruned", 0.004), _record("base", 0.006, "compile")]
    latency += [_record("pruned", 0.003, "compile")]
    assert latency_rows(latency) == [
        ("latency, batch 1, eager, cpu, 2 threads", *["4.00 ms (2.00 to 8.00)"] * 2, "no change"),
        (
            "latency, batch 1, compile, cpu, 2 threads",
            "6.00 ms (3.00 to 12.00)",
            "3.00 ms (1.50 to 6.00)",
            "about 2.00 x faster",
        ),
    ]
    failed = {"latency_failed": {"compile": "no"}, "exports_failed": {"onnx": "never"}, "latency": latency}
    assert remarks(failed) == ["compile: no", "onnx: never"]
