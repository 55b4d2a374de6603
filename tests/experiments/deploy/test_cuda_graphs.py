"""A pass as a CUDA graph: what is captured, copied and replayed, how it is timed, and where it is refused."""

import pytest
import torch
from gpu_events import note_events
from keepdrop import profile
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.errors import UserError
from keepdrop.experiments.deploy import latency, runtimes
from keepdrop.experiments.deploy.fastest import code_of
from keepdrop.experiments.deploy.latency import measure_latency
from keepdrop.experiments.deploy.runtimes import check_runtimes, chosen_runtimes, not_timed, runner
from recorded_graphs import RecordedCapture

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def capture(monkeypatch):
    """Graphs without a GPU, in place of those of the device."""
    recorded = RecordedCapture()
    monkeypatch.setattr(runtimes, "capture_of", lambda device: recorded)
    return recorded


@torch.no_grad()
def test_one_graph_for_each_shape_and_new_values_are_copied_into_it(capture):
    model, images = small_cnn().eval(), torch.randn(2, 1, 8, 8)
    run = runner(model, "cuda-graphs", images)
    others = torch.randn(2, 1, 8, 8)
    before = others.clone()
    for each in (images, others):
        assert torch.allclose(run(each), model(each), atol=1e-6)
    assert (capture.captures, capture.replays) == (1, 3) and torch.equal(others, before)
    assert torch.allclose(run(others[:1]), model(others[:1]), atol=1e-6) and capture.captures == 2


@torch.no_grad()
def test_inputs_by_name_are_copied_as_well(capture):
    class Sum(torch.nn.Module):
        def forward(self, a, *, b):
            return {"sum": a + b}

    run = runner(Sum(), "cuda-graphs", {"a": torch.zeros(2), "b": torch.zeros(2)})
    assert run({"a": torch.ones(2), "b": torch.full((2,), 2.0)})["sum"].tolist() == [3.0, 3.0] and capture.captures == 1


class Reads(torch.nn.Module):
    def forward(self, x):
        return x * x.sum().item()


def test_a_network_that_reads_values_back_is_one_sentence(capture):
    with pytest.raises(UserError, match=r"CUDA graphs cannot take the network \(RuntimeError: operation not permitted"):
        runner(Reads(), "cuda-graphs", torch.ones(2))


def test_on_a_processor_it_is_refused_and_not_missed(keepdrop):
    sentence = "cuda-graphs, which needs a CUDA GPU, and the device is cpu; expected any of eager, compile, onnxruntime"
    with pytest.raises(UserError, match=f"latency.runtimes has {sentence} there."):
        check_runtimes(["eager", "cuda-graphs"])
    with pytest.raises(UserError, match=f"^runtimes has {sentence}"):
        profile(small_cnn(), torch.zeros(1, 1, 8, 8), runtimes=["cuda-graphs"], progress=False)
    result = keepdrop("profile", "runtimes=[cuda-graphs]")
    assert result.code == 2 and sentence in result.err and result.err.count("\n") == 1
    result = keepdrop("prune", "target.latency=0.6", "profile.runtime=cuda-graphs", "base.epochs=0")
    assert result.code == 2 and f"profile.runtime is {sentence}" in result.err and result.err.count("\n") == 1
    assert "cuda-graphs" not in chosen_runtimes(["all"]) and "cuda-graphs" not in not_timed(["eager"])
    assert "cuda-graphs" in chosen_runtimes(["all"], "cuda") and "cuda-graphs" in not_timed(["eager"], "cuda")
    check_runtimes(["cuda-graphs"], "cuda:1")
    with pytest.raises(UserError, match=f"^runtimes has {sentence}"):
        measure_latency({"a": small_cnn()}, torch.zeros(1, 1, 8, 8), runtimes=["cuda-graphs"])


def test_the_latency_card_times_it_by_events_on_its_own_gpu(capture, monkeypatch):
    said = note_events(monkeypatch, lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(latency, "_device", lambda inputs: torch.device("cuda:1"))
    models = {"base": small_cnn().eval()}
    (record,) = measure_latency(models, torch.zeros(1, 1, 8, 8), (1,), 2, 0, runtimes=("cuda-graphs",))
    assert (record.runtime, record.device, record.n_threads) == ("cuda-graphs", "NVIDIA H200", 0)
    assert record.median_seconds == record.low_seconds == 4e-3
    assert said == ["wait", "stream of cuda:1", "stream of cuda:1", "wait"] * 2


def test_the_line_that_runs_it():
    record = {"model": "pruned", "runtime": "cuda-graphs"}
    assert code_of(record, "run", False) == (
        'model = torch.cuda.make_graphed_callables(keepdrop.load_pruned("run/pruned").cuda(), (images,))  # under '
        "torch.no_grad(), for images of this shape"
    )
    assert code_of(record | {"model": "base"}, "run", False).startswith("model = torch.cuda.make_graphed_callables(de")


@GPU
def test_a_real_graph_answers_as_the_network_and_is_profiled(tmp_path):
    device = torch.device("cuda")
    model, images = small_cnn().eval().to(device), torch.randn(2, 1, 8, 8, device=device)
    with torch.inference_mode():
        run = runner(model, "cuda-graphs", images)
        others = torch.randn_like(images)
        assert torch.allclose(run(others).clone(), model(others), atol=1e-4)
        assert torch.allclose(run(images).clone(), model(images), atol=1e-4)
    found = profile(model, images, runtimes=["eager", "cuda-graphs"], batch_sizes=(1,), samples=6, progress=False)
    assert [each.runtime for each in found.tables] == ["eager", "cuda-graphs"] and found.conditions.n_threads == 0
    assert found.tables[1].dense_seconds < found.tables[0].dense_seconds


@GPU
def test_a_network_that_reads_values_back_is_refused_and_the_gpu_still_works():
    images = torch.ones(2, device="cuda")
    with pytest.raises(UserError, match="CUDA graphs cannot take the network"), torch.inference_mode():
        runner(Reads(), "cuda-graphs", images)
    assert (images + images).sum().item() == 4.0
