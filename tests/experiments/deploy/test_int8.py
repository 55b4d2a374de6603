"""int8 files: calibrated on fit images alone, scored by the same metric, refused before a search where impossible."""

import dataclasses
import importlib.util

import keepdrop
import pytest
import torch
from keepdrop.envs.data.datasets import from_datasets
from keepdrop.envs.data.objective import Objective
from keepdrop.envs.data.packing import packing_of
from keepdrop.envs.evaluation.mask_evaluator import accuracy_on
from keepdrop.envs.networks.answers import ready_network
from keepdrop.envs.networks.built_in import cifar_resnet
from keepdrop.errors import UserError
from keepdrop.experiments.deploy import export
from keepdrop.experiments.deploy.export import FileNetwork, as_exported, check_exports, export_all, try_exports
from keepdrop.experiments.deploy.int8 import calibration_images, int8_sentence
from torch import nn
from zoo import ZOO

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed (extra 'onnx')",
)


def _splits(inputs, labels):
    """120 items: 40 for each role."""
    parts = [(inputs(slice(0, 60)), labels[:60]), (inputs(slice(60, 120)), labels[60:])]
    data = from_datasets(*([*zip(*part, strict=True)] if isinstance(part[0], list) else part for part in parts))
    return keepdrop.split(data, reward_from="train", reward_size=20, seed=0, objective=Objective())


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 3, 8, 8, generator=generator)
    return _splits(lambda rows: x[rows], torch.randint(0, 10, (120,), generator=generator))


class Unread:
    """Images that nothing may be read of."""

    def __init__(self, images):
        self.labels, self.image_shape, self.n_classes = images.labels, images.image_shape, images.n_classes

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        raise AssertionError("reward images were read")


@needs_onnx
def test_int8_is_calibrated_on_fit_images_and_scored_on_report_images(images, tmp_path):
    import onnx

    torch.manual_seed(0)
    model = cifar_resnet(8).eval()
    splits = dataclasses.replace(images, reward=Unread(images.reward))
    (facts,), failed = export_all(model, images.example, tmp_path, ["onnx-int8"], splits)
    assert failed == {} and [each.name for each in tmp_path.iterdir()] == [facts["file"]] == ["model.int8.onnx"]
    nodes = onnx.load(tmp_path / facts["file"]).graph.node
    kinds = {node.op_type for node in nodes}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds and "BatchNormalization" not in kinds
    assert facts["n_bytes"] == (tmp_path / facts["file"]).stat().st_size < 0.6 * facts["float_bytes"]
    network = FileNetwork(tmp_path / facts["file"], model, model, images.example)
    assert facts["accuracy"] == accuracy_on(network, images.report)
    assert facts["float_accuracy"] == accuracy_on(model, images.report)
    assert 0 < facts["largest_difference"] < 0.2  # int8 answers nearly as float32 does, and not exactly


@needs_onnx
def test_every_output_channel_has_its_own_scale(images, tmp_path):
    import onnx

    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([1.0, 10, 100, 1, 10, 100]).view(-1, 1, 1, 1))
    export.export_int8(model, images.example, calibration_images(images.fit), tmp_path / "a.onnx")
    arrays = [onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "a.onnx").graph.initializer]
    scales = next(each for each in arrays if each.shape == (6,) and each.dtype.name == "float32" and each.min() > 0)
    expected = model[0].weight.detach().abs().amax((1, 2, 3)).numpy() / scales
    assert expected.max() / expected.min() < 1.05


class Both(nn.Module):
    """An image and a row of numbers; two answers, of which the second counts."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 6, 3), nn.Linear(4, 6)
        self.first, self.second = nn.Linear(6, 2), nn.Linear(6, 10)

    def forward(self, image, row):
        found = self.conv(image).relu().mean((2, 3)) + self.linear(row)
        return {"first": self.first(found), "logits": self.second(found)}


@needs_onnx
def test_several_inputs_and_outputs(tmp_path):
    generator = torch.Generator().manual_seed(1)
    x, rows = torch.randn(120, 3, 8, 8, generator=generator), torch.randn(120, 4, generator=generator)
    splits = _splits(lambda part: [*zip(x[part], rows[part], strict=True)], torch.arange(120) % 10)
    model, _ = ready_network(Both().eval(), splits.example, None, packing_of(splits.fit))
    (facts,), failed = export_all(model.eval(), splits.example, tmp_path, ["onnx-int8"], splits)
    assert failed == {}
    network = FileNetwork(tmp_path / facts["file"], model, *as_exported(model, splits.example))
    items = splits.fit.batch(torch.arange(40))[0]  # whose range is known
    with torch.no_grad():
        assert torch.allclose(network(items), model(items), atol=0.05 * float(model(items).abs().max()))


@needs_onnx
@pytest.mark.parametrize(
    ("model", "why"),
    [
        (ZOO["Branching"](), "The network cannot be exported"),
        (nn.Sequential(nn.Flatten(), nn.Tanh()), "finds no layer of the network"),
    ],
)
def test_networks_that_cannot_be_int8_are_refused_before_a_search(images, model, why):
    with pytest.raises(UserError, match=f"^export has onnx-int8, and that cannot be had: .*{why}"):
        try_exports(["onnx-int8"], model, images)
    try_exports(["onnx"], model, images)


def test_without_the_packages_int8_is_refused(images, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "EXTRA", ("onnx_of_another_world",))
    with pytest.raises(
        UserError, match=r"needs onnx_of_another_world.*; install them with: pip install 'keepdrop\[onnx\]'"
    ):
        check_exports(["onnx-int8"])
    _, failed = export_all(nn.Flatten(), images.example, tmp_path, ["onnx-int8"])
    assert "is calibrated on training images" in failed["onnx-int8"]


def test_calibration_images_are_spread_over_all_fit_images(images):
    batches = calibration_images(images.fit)
    assert sum(map(len, batches)) == len(images.fit) == 40 and max(map(len, batches)) == 32
    assert torch.equal(torch.cat(batches), images.fit.batch(torch.arange(40))[0])


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [(0.9, "(float32 90.00 %: no change)."), (0.89, "(float32 90.00 %: -1.00 points)."), (0.8, "far worse: check it")],
)
def test_what_int8_costs_is_said(accuracy, said):
    facts = {"file": "model.int8.onnx", "n_bytes": 2500, "float_bytes": 10000}
    sentence = int8_sentence({**facts, "accuracy": accuracy, "float_accuracy": 0.9}, "accuracy")
    assert said in sentence and "2.5 kB (float32 10.0 kB)" in sentence
    assert ("far worse" in sentence) == (accuracy == 0.8)
