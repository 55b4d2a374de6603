"""Signals (n, C, L) and volumes (n, C, D, H, W) from `prune` to report and files, and coordinates as targets."""

import json
import re

import keepdrop as public
import numpy as np
import pytest
import torch
from keepdrop import Settings, TrainSettings
from keepdrop.experiments.deploy.export import export_verified
from torch import nn

KINDS = {"signals": (48,), "volumes": (4, 7, 6)}
SHORT = ["base.epochs=4", "base.lr=0.05", "base.batch_size=32", "split.reward_size=80", "layers=['0']"]


def network(n_sides):
    """Two convolutions over one or three sides; 3 classes."""
    convolution, norm, pool = {
        1: (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d),
        3: (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d),
    }[n_sides]
    body = [convolution(2, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(), convolution(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*body, pool(1), nn.Flatten(), nn.Linear(8, 3))


def waves(count, sides, seed):
    """Noise (count, 2, *sides) and waves along the last side, of which the class (count,) is the number."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % 3
    phase = rng.random((count, 1)) * 6.28
    wave = np.sin(6.28 * (labels[:, None] * 2 + 1) / 2 * np.linspace(0, 1, sides[-1]) * sides[-1] / 6 + phase)
    pixels = 0.3 * rng.standard_normal((count, 2, *sides)) + wave.reshape(count, *[1] * len(sides), sides[-1])
    return pixels.astype(np.float32), labels


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def arrays(kind):
    (x_train, y_train), (x_test, y_test) = waves(270, KINDS[kind], 0), waves(150, KINDS[kind], 1)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


MODULE = """
import sys
sys.path.insert(0, {here!r})
from test_signals import KINDS, network as make, waves

def network():
    return make(len(KINDS[{kind!r}]))

def data():
    return waves(270, KINDS[{kind!r}], 0), waves(150, KINDS[{kind!r}], 1)
"""


def test_the_whole_way_from_the_command_line(keepdrop, tmp_path, tiny, kind, arrays, request):
    source = {"signals": "npz", "volumes": "custom"}[kind]
    name = f"of_{kind}_{source}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(here=str(request.path.parent), kind=kind))
    np.savez(tmp_path / "waves.npz", **arrays)
    given = {"npz": ["data=npz", "data.path=waves.npz"], "custom": ["data=custom", f"data._target_={name}.data"]}
    own = ["network=custom", f"network._target_={name}.network", *given[source]]
    done = keepdrop("prune", *own, *tiny, *SHORT, "controls=[]", "export=[program]", "run_dir=run")
    assert done.code == 0, done.err
    assert "The default augmentation is left out: it is for images, and these are signals or volumes" in done.err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["base_accuracy"] > 0.6 and metrics["pruned_macs"] < metrics["base_macs"]
    pruned = public.load_pruned(tmp_path / "run/pruned", lambda: network(len(KINDS[kind])))
    example = torch.from_numpy(arrays["x_test"][:2])
    exported = torch.export.load(tmp_path / "run/pruned/model.pt2").module()
    torch.testing.assert_close(exported(example), pruned(example))
    assert "<table" in (tmp_path / "run/report.html").read_text() and keepdrop("report", "run").code == 0
    trusted = [each for each in own if name in each]
    weights = "checkpoint=run/base/model.safetensors"
    again = keepdrop("apply", "agents=run", weights, *trusted, "controls=[]", "run_dir=again")
    assert again.code == 0, again.err
    refused = keepdrop("prune", *own, *tiny, *SHORT, "augment=shift", "run_dir=other")
    shown = re.escape(str((2, *KINDS[kind])))
    assert re.search(rf"RandomCropFlip shifts and mirrors images \(channels, .*these are {shown}; leave", refused.err)


def test_the_whole_way_from_python(kind, arrays, tmp_path):
    train, test = ((arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test"))
    torch.manual_seed(0)
    model = network(len(KINDS[kind]))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.from_numpy(train[0])), torch.from_numpy(train[1])).backward()
        optimizer.step()
    settings = Settings(agent=public.AgentSettings(updates=3), masks=4, images=None)
    tuned = TrainSettings(epochs=1, batch_size=32, lr=0.01)
    result = public.prune(model, train, test, drop_bound=0.2, finetune=tuned, settings=settings)
    assert result.base_accuracy > 0.6 and result.macs < result.base_macs
    result.save(tmp_path / "small")
    loaded = public.load_pruned(tmp_path / "small", lambda: network(len(KINDS[kind])))
    assert torch.equal(loaded(result.example), result.model(result.example))


def test_onnx(kind, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} (extra onnx) is not installed")
    model, example = network(len(KINDS[kind])).eval(), torch.from_numpy(waves(3, KINDS[kind], 0)[0])
    found = export_verified(model, example, tmp_path, "onnx")
    assert (tmp_path / "model.onnx").is_file() and found.largest_difference < 1e-4


@pytest.mark.parametrize("chosen", [[], ["augment=shift"]])
def test_coordinates_are_not_augmented_unless_asked_for(keepdrop, points, tmp_path, chosen):
    done = keepdrop("train-cnn", *points, "metric.scale=0.1", "base.epochs=1", "base.lr=0.01", *chosen, "run_dir=run")
    assert done.code == 0, done.err
    said = "The default augmentation is left out: it moves images, and their targets are no classes" in done.err
    stored = (tmp_path / "run/config.yaml").read_text()
    assert said is not bool(chosen) and ("augment: null" in stored) is said and ("RandomCropFlip" in stored) is not said
