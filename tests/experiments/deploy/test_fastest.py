"""What runs where: the fastest way of each batch size, in words and as a line of code."""

import pytest
from keepdrop.experiments.deploy import runtimes
from keepdrop.experiments.deploy.fastest import code_of, fastest, fastest_ways, int8_times, not_timed_sentence
from keepdrop.experiments.deploy.latency import fixed_share, speed_advice
from keepdrop.experiments.deploy.runtimes import check_runtimes, chosen_runtimes, not_timed


def _record(model, ms, batch=1, runtime="eager", spread=0.01):
    return {
        "model": model, "batch_size": batch, "runtime": runtime, "device": "a processor", "n_threads": 2,
        "median_seconds": ms / 1e3, "low_seconds": (1 - spread) * ms / 1e3, "high_seconds": (1 + spread) * ms / 1e3,
    }  # fmt: skip


def _all(batch, dense, pruned, dense_onnx, pruned_onnx, int8):
    return [
        _record("base", dense, batch), _record("pruned", pruned, batch),
        _record("base", dense_onnx, batch, "onnxruntime"), _record("pruned", pruned_onnx, batch, "onnxruntime"),
        _record("int8", int8, batch, "onnxruntime"),
    ]  # fmt: skip


def test_the_fastest_of_each_batch_size_in_one_sentence():
    latency = [*_all(1, 2.0, 1.5, 1.0, 0.8, 0.5), *_all(64, 60.0, 20.0, 40.0, 30.0, 25.0)]
    (first, best), (second, _) = fastest_ways(latency)
    assert first == (
        "Fastest on a processor, 2 threads, at batch 1: pruned int8, onnxruntime (0.50 ms, 4.00 x faster than dense, "
        "eager)."
    )
    assert second.startswith("Fastest on a processor, 2 threads, at batch 64: pruned, eager (20.00 ms, 3.00 x faster")
    assert int8_times(latency) == (
        " In onnxruntime 0.50 ms at batch 1 (float32 0.80 ms: 1.60 x faster), "
        "25.00 ms at batch 64 (float32 30.00 ms: 1.20 x faster)."
    )
    assert code_of(best, "runs/a", False, ["onnx-int8"]) == (
        'session = onnxruntime.InferenceSession("runs/a/pruned/model.int8.onnx")'
    )
    same = [*_all(1, 2.0, 1.5, 1.0, 0.8, 0.5), *_all(64, 60.0, 20.0, 40.0, 30.0, 15.0)]
    assert [sentence.partition(":")[0] for sentence, _ in fastest_ways(same)] == [
        "Fastest on a processor, 2 threads, at batch 1 and 64"
    ]


def test_the_dense_network_is_fastest_only_where_it_really_is():
    overlapping = [_record("base", 1.0, spread=0.2), _record("pruned", 1.1, spread=0.2)]
    assert fastest(overlapping)[1]["model"] == "pruned"
    apart = [_record("base", 1.0), _record("pruned", 1.5)]
    assert fastest(apart)[1]["model"] == "base"
    assert "pruning made nothing faster here" in code_of(apart[0], "run", False)


@pytest.mark.parametrize(
    ("runtime", "own", "line"),
    [
        ("eager", False, 'model = keepdrop.load_pruned("run/pruned")'),
        ("eager", True, 'model = keepdrop.load_pruned("run/pruned", network)'),
        ("compile", False, 'model = torch.compile(keepdrop.load_pruned("run/pruned"), dynamic=False)'),
        (
            "onnxruntime",
            True,
            'session = onnxruntime.InferenceSession("run/pruned/model.onnx")  # export=[onnx] writes the file',
        ),
    ],
)
def test_the_line_that_runs_it(runtime, own, line):
    assert code_of(_record("pruned", 1.0, runtime=runtime), "run", own) == line


def test_what_was_not_timed_is_named_with_what_it_takes(monkeypatch):
    monkeypatch.setattr(runtimes, "RUNTIME", "onnxruntime_of_another_world")
    monkeypatch.setattr(runtimes, "missing_packages", lambda *names: list(names))
    left = not_timed(["eager"])
    sentence = not_timed_sentence(left)
    assert (
        "onnxruntime needs onnxruntime_of_another_world; install them with: pip install 'keepdrop[onnx]'." in sentence
    )
    assert "compile was not asked for: latency.runtimes=[all] times it." in sentence or "C++ compiler" in sentence
    assert not_timed_sentence({}) is None
    check_runtimes(["all"])
    assert "onnxruntime" not in chosen_runtimes(["all"]) and chosen_runtimes(["eager"]) == ["eager"]
    assert "onnxruntime" not in chosen_runtimes(["all"], "cuda")


def test_the_part_of_a_pass_that_images_do_not_pay_for():
    """0.1 ms and 0.01 ms an image, so a pass of one image is 10/11 calls and one of 64 is 10/74."""
    latency = [_record(model, 0.1 + 0.01 * batch, batch) for batch in (1, 64) for model in ("base", "pruned")]
    assert fixed_share(latency, "eager", 1) == pytest.approx(10 / 11)
    assert fixed_share(latency, "eager", 64) == pytest.approx(10 / 74)
    assert fixed_share(latency[:2], "eager", 1) is None
    assert speed_advice(0.4, latency) == (
        "MACs changed by -60 %, but the time of a pass by 0 % at batch 1 (eager), 0 % at batch 64 (eager). At batch 1 "
        "about 91 % of the dense network's 0.11 ms (eager) goes into calling layers, which takes as long for few "
        "filters as for many: compile and onnxruntime have less of it (latency.runtimes=[all]). Processors are fastest "
        "with round channel counts: try surgery.round_to=8."
    )
    on_gpu = [each | {"n_threads": 0} for each in latency]
    assert "for many: compile and cuda-graphs have less of it" in (speed_advice(0.4, on_gpu) or "")


def test_times_of_a_busy_machine_are_not_explained_by_widths():
    latency = [_record("base", 1.0), _record("pruned", 1.0) | {"high_seconds": 13.6e-3}]
    said = speed_advice(0.4, latency)
    assert said is not None and said.endswith(
        "At batch 1 a quarter of the passes took 13.60 ms or more and half of them at most 1.00 ms (eager): the "
        "machine was busy, and these times say little."
    )
