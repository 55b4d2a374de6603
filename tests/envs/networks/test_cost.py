"""MACs and parameters against hand counts; latency records."""

import copy
import importlib.util
import re

import pytest
import torch
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn, vgg16_bn
from keepdrop.envs.networks.checkpoint import hash_state
from keepdrop.envs.networks.cost import count_cost
from keepdrop.errors import UserError
from keepdrop.experiments.deploy import runtimes
from keepdrop.experiments.deploy.latency import device_name, measure_latency, speed_advice, speed_change
from keepdrop.experiments.deploy.runtimes import check_runtimes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed (extra 'onnx')",
)

# module, shape of one image, MACs by hand
BY_HAND = {
    "conv1d": (nn.Conv1d(3, 8, 5), (3, 20), 8 * 16 * 3 * 5),
    "conv2d": (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 12), 8 * 10 * 12 * 3 * 9),
    "conv2d_stride": (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 10, 12), 8 * 5 * 6 * 3 * 9),
    "conv2d_dilated": (nn.Conv2d(3, 8, (3, 1), dilation=2), (3, 10, 12), 8 * 6 * 12 * 3 * 3),
    "grouped": (nn.Conv2d(8, 12, 3, padding=1, groups=4), (8, 6, 6), 12 * 36 * 2 * 9),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 6, 6), 8 * 36 * 9),
    "conv3d": (nn.Conv3d(2, 4, 3, padding=1), (2, 4, 5, 6), 4 * 120 * 2 * 27),
    "transposed": (nn.ConvTranspose2d(6, 4, 2, stride=2), (6, 5, 5), 6 * 25 * 4 * 4),
    "transposed_grouped": (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (6, 5, 5), 6 * 25 * 2 * 9),
    "linear": (nn.Linear(7, 5), (7,), 35),
    "linear_over_positions": (nn.Linear(7, 5), (4, 7), 4 * 35),
    "lstm": (nn.LSTM(7, 5, batch_first=True), (4, 7), 4 * 4 * 5 * (7 + 5)),
    "gru_of_two_directions": (nn.GRU(7, 5, 2, bidirectional=True, batch_first=True), (4, 7), 4 * 2 * 3 * 5 * (12 + 15)),
    "cell": (nn.RNNCell(7, 5), (7,), 5 * (7 + 5)),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("n_images", [1, 3])
def test_modules_against_hand_counts(name, n_images):
    module, shape, macs = BY_HAND[name]
    cost = count_cost(nn.Sequential(module), torch.zeros(n_images, *shape))
    assert cost.macs == cost.modules["0"].macs == macs
    assert cost.params == cost.modules["0"].params == sum(p.numel() for p in module.parameters())


def test_resnet20_by_hand():
    stage = 16 * 16 * 9 * 1024  # every 3x3 conv inside a stage costs the same in all three
    entries = 2 * (stage // 2)  # the first conv of stages 2 and 3 reads half the channels
    cost = count_cost(cifar_resnet(20), torch.zeros(1, 3, 32, 32))
    assert cost.macs == 3 * 16 * 9 * 1024 + 16 * stage + entries + 640
    assert cost.modules["layer2.0.conv1"].macs == stage // 2
    assert cost.params == 269_722


def test_vgg16_by_hand():
    widths, sides = (64, 64, 128, 128, 256, 256, 256, *[512] * 6), (32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2)
    weights = [9 * before * width for before, width in zip((3, *widths), widths, strict=False)]
    cost = count_cost(vgg16_bn(), torch.zeros(1, 3, 32, 32))
    assert cost.macs == sum(size * side**2 for size, side in zip(weights, sides, strict=True)) + 5120
    assert cost.params == sum(weights) + 2 * sum(widths) + 5130


def test_shared_module_counts_every_call_and_its_parameters_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.alias = self.linear

        def forward(self, x):
            return self.linear(self.alias(x))

    cost = count_cost(Twice(), torch.zeros(1, 4))
    assert (cost.macs, cost.params) == (32, 20)
    assert cost.modules["linear"].n_calls == 2 and "alias" not in cost.modules


def test_several_inputs_by_position_and_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(5, 2)

        def forward(self, left, right):
            return self.left(left) + self.right(right)

    left, right = torch.zeros(2, 3), torch.zeros(2, 5)
    assert count_cost(Two(), (left, right)).macs == 16
    assert count_cost(Two(), {"right": right, "left": left}).macs == 16


def test_model_comes_back_as_it_was():
    model = small_cnn().train()
    model.bn2.eval()
    before = hash_state(model)
    count_cost(model, torch.randn(2, 1, 8, 8))
    assert hash_state(model) == before
    assert model.training and model.bn1.training and not model.bn2.training
    assert not any(module._forward_hooks for module in model.modules())


def test_failing_forward_leaves_no_hooks():
    model = small_cnn().train()
    with pytest.raises(RuntimeError):
        count_cost(model, torch.zeros(1, 5, 8, 8))
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_latency_gives_a_record_for_every_model_and_batch_size():
    torch.set_num_threads(1)
    models = {"dense": small_cnn(), "pruned": small_cnn(widths=(4, 4, 4, 4, 4))}
    records = measure_latency(models, torch.zeros(2, 1, 8, 8), batch_sizes=(1, 5), repeats=4, warmup=1)
    assert [(r.model, r.batch_size) for r in records] == [("dense", 1), ("pruned", 1), ("dense", 5), ("pruned", 5)]
    for record in records:
        assert 0 < record.low_seconds <= record.median_seconds <= record.high_seconds
        assert (record.n_threads, record.device, record.repeats) == (1, device_name("cpu"), 4)
    assert models["dense"].training


def test_latency_models_take_turns_and_see_the_batch_size():
    seen = []
    models = {name: lambda images, name=name: seen.append((name, len(images))) for name in "ab"}
    measure_latency(models, (torch.zeros(3, 1, 8, 8),), batch_sizes=(7,), repeats=2, warmup=0)
    assert seen == [("b", 7), ("a", 7), ("a", 7), ("b", 7)]


@needs_onnx
def test_latency_in_other_runtimes():
    """Every runtime sees every model and batch size, in turn; one that cannot take a model is left out and named."""
    models = {"dense": small_cnn(widths=(8, 8)), "pruned": small_cnn(widths=(4, 4))}
    records = measure_latency(models, torch.zeros(2, 1, 8, 8), (1, 3), repeats=2, warmup=0, runtimes=("onnxruntime",))
    assert [(r.model, r.batch_size, r.runtime) for r in records] == [
        (name, size, "onnxruntime") for size in (1, 3) for name in models
    ]
    models = {name: ZOO["Branching"]() for name in models}
    images, both, failed = torch.zeros(2, 3, 8, 8), ("eager", "onnxruntime"), {}
    records = measure_latency(models, images, (1,), repeats=1, warmup=0, runtimes=both, failed=failed)
    assert {r.runtime for r in records} == {"eager"} and "cannot be exported" in failed["onnxruntime"]
    with pytest.raises(UserError, match="cannot be exported"):
        measure_latency(models, images, (1,), repeats=1, warmup=0, runtimes=both)


def test_runtimes_are_checked_before_anything_runs(monkeypatch):
    check_runtimes(["eager"])
    with pytest.raises(UserError, match=r"latency.runtimes has 'fast'; expected any of eager, compile, onnxruntime"):
        check_runtimes(["fast"])
    with pytest.raises(UserError, match="expected at least one, each one once"):
        check_runtimes([])
    with pytest.raises(UserError, match="onnxruntime, which is measured on the CPU, not on cuda"):
        check_runtimes(["onnxruntime"], "cuda")
    monkeypatch.setattr(runtimes, "COMPILERS", ())
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        check_runtimes(["compile"])
    monkeypatch.setattr(runtimes, "RUNTIME", "onnxruntime_of_another_world")
    with pytest.raises(UserError, match=r"onnxruntime_of_another_world; .* 'keepdrop\[onnx\]'"):
        check_runtimes(["onnxruntime"])


@pytest.mark.slow
def test_compiled_networks_answer_as_before_and_are_timed():
    model, images = small_cnn(widths=(8, 8)).eval(), torch.randn(3, 1, 8, 8)
    with torch.inference_mode():
        assert torch.allclose(runtimes.runner(model, "compile", images)(images), model(images), atol=1e-5)
    (record,) = measure_latency({"a": model}, images, (3,), repeats=1, warmup=0, runtimes=("compile",))
    assert record.runtime == "compile" and record.median_seconds < 1


def test_latency_refuses_what_measures_nothing():
    with pytest.raises(UserError, match=re.escape("batch sizes of 1 or more, repeats >= 1 and warmup >= 0")):
        measure_latency({"a": small_cnn()}, torch.zeros(1, 1, 8, 8), batch_sizes=(0,))


def _timed(before, after, batch=1, spread=0.01, runtime="eager"):
    """Latency records of the base and the pruned network, in milliseconds."""
    return [
        {
            "model": model,
            "batch_size": batch,
            "runtime": runtime,
            **{
                f"{name}_seconds": (1 + sign * spread) * ms / 1000
                for name, sign in (("median", 0), ("low", -1), ("high", 1))
            },
        }
        for model, ms in (("base", before), ("pruned", after))
    ]


@pytest.mark.parametrize(("macs", "after"), [(0.5, 5.0), (0.5, 8.0), (0.95, 12.0), (1.0, 10.0), (0.8, 9.4)])
def test_no_advice_where_time_fell_or_hardly_any_macs_went(macs, after):
    assert speed_advice(macs, _timed(10.0, after)) is None


def test_advice_where_macs_fell_and_time_did_not():
    both = [*_timed(10.0, 9.7), *_timed(600.0, 660.0, batch=64), *_timed(30.0, 15.0, batch=64, runtime="compile")]
    assert speed_advice(0.6, both) == (
        "MACs changed by -40 %, but the time of a pass by -3 % at batch 1 (eager), +10 % at batch 64 (eager). "
        "Processors are fastest with round channel counts: try surgery.round_to=8."
    )
    assert speed_advice(0.6, both, round_to=8).endswith("try surgery.round_to=16.")
    short = speed_advice(0.5, _timed(0.2, 0.2))
    assert "0 % at batch 1" in short and "overhead" in short and "round_to" not in short
    with pytest.raises(ValueError, match="must be positive"):
        speed_advice(0.0, both)


@pytest.mark.parametrize(
    ("before", "after", "spread", "said"),
    [
        (10.0, 8.0, 0.01, "1.25 x faster"),
        (8.0, 10.0, 0.01, "1.25 x slower"),
        (10.0, 8.0, 0.2, "about 1.25 x faster"),
        (8.0, 10.0, 0.2, "about 1.25 x slower"),
        (10.0, 10.04, 0.0001, "no change"),
    ],
)
def test_speed_is_said_with_its_spread(before, after, spread, said):
    """The table and the advice speak of the same medians: neither says faster where the other says slower."""
    assert speed_change(*_timed(before, after, spread=spread)) == said


def test_macs_agree_with_a_peers_counter():
    """torch-pruning counts biases and normalisation, too; without either, every layer must agree."""
    tp = pytest.importorskip("torch_pruning")
    layers = [
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 12, (3, 1), groups=4, dilation=2, bias=False), nn.Conv2d(12, 6, 1, bias=False), nn.Flatten(),
        nn.Linear(6 * 3 * 7, 5, bias=False),
    ]  # fmt: skip
    model, images = nn.Sequential(*layers).eval(), torch.randn(1, 3, 16, 16)
    macs, params = tp.utils.count_ops_and_params(model, images)
    relu = 8 * 7 * 7
    cost = count_cost(model, images)
    assert (cost.macs, cost.params) == (macs - relu, params) and cost.macs > 10_000


# It knows no recurrent layers, and counts the products of attention.
OTHERWISE = {"lstm", "gru_of_two_directions", "cell", "Recurrent", "Attending"}


@pytest.mark.parametrize("name", sorted({*BY_HAND, *ZOO, "small_cnn", "cifar_resnet", "vgg16_bn"} - OTHERWISE))
def test_macs_agree_with_torchs_own_counter(name):
    """It counts two flops a multiply-accumulate, of convolutions and matrix products alike."""
    networks = {"small_cnn": (small_cnn, 1), "cifar_resnet": (lambda: cifar_resnet(20), 3), "vgg16_bn": (vgg16_bn, 3)}
    if name in BY_HAND:
        model, inputs = BY_HAND[name][0], torch.zeros(1, *BY_HAND[name][1])
    else:
        make, channels = networks.get(name, (ZOO.get(name), 3))
        model, inputs = make(), torch.zeros(1, channels, *[32 if name == "vgg16_bn" else 8] * 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).eval()(inputs)
    assert count_cost(model, inputs).macs == counter.get_total_flops() // 2
