"""Exported networks give what the network gives, for any batch size, and a failed export leaves the old file."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.groups.verification import randomised
from keepdrop.envs.networks.built_in import cifar_resnet
from keepdrop.envs.surgery.cutting import prune
from keepdrop.errors import UserError
from keepdrop.experiments.deploy import export
from keepdrop.experiments.deploy.export import check_exports, export_all, export_onnx, export_program
from torch import nn
from zoo import ZOO

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed (extra 'onnx')",
)


@pytest.fixture
def pruned():
    generator = torch.Generator().manual_seed(5)
    model = randomised(cifar_resnet(8), generator).float()
    images = torch.randn(5, 3, 16, 16, generator=generator)
    groups = find_groups(model, images[:1], verify=False).groups
    return prune(model, {group: torch.arange(group.n_filters) % 3 > 0 for group in groups}).train(), images


def _expected(model, images):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(images)


def test_program_equals_the_network_for_any_batch(pruned, tmp_path):
    model, images = pruned
    before = copy.deepcopy(model.state_dict())
    export_program(model, images[:1], tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for n in (1, 2, 5):
        assert torch.allclose(loaded(images[:n]), _expected(model, images[:n]), rtol=1e-5, atol=1e-6)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [each.name for each in tmp_path.iterdir()] == ["net.pt2"]


@needs_onnx
def test_onnx_equals_the_network_for_any_batch(pruned, tmp_path):
    import onnxruntime

    model, images = pruned
    export_onnx(model, images[:1], tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 5):
        (logits,) = session.run(["logits"], {"images": images[:n].numpy()})
        expected = _expected(model, images[:n]).numpy()
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    assert [each.name for each in tmp_path.iterdir()] == ["net.onnx"]


@needs_onnx
@pytest.mark.parametrize("shape", [(16,), (8, 8), (6, 6, 6)])
def test_onnx_names_its_batch_axis_whatever_the_images(shape, tmp_path):
    """Signals (B, C, L), images and volumes; the exporter alone would call the axis s77."""
    import onnxruntime

    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    model = nn.Sequential(kinds[len(shape)](3, 4, 3), nn.ReLU(), nn.Flatten(2), Mean())
    export.export_verified(model, torch.randn(2, 3, *shape), tmp_path, "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, *shape] and session.get_outputs()[0].shape == ["batch", 4]


def test_onnx_says_what_is_missing(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "EXTRA", ("onnx_of_another_world",))
    with pytest.raises(UserError, match=r"needs onnx_of_another_world; .* pip install 'keepdrop\[onnx\]'"):
        export_onnx(*pruned, tmp_path / "net.onnx")


class Mean(nn.Module):
    """Over the last axis."""

    def forward(self, x):
        return x.mean(-1)


class Pair(nn.Module):
    """Two images and a number."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.linear = nn.Conv2d(3, 6, 1), nn.Conv2d(1, 6, 1), nn.Linear(6, 2)

    def forward(self, image, depth, scale=1.0):
        return self.linear((self.left(image) + self.right(depth)).relu().mean((2, 3))) * scale


INPUTS = (torch.randn(4, 3, 5, 5), torch.randn(4, 1, 5, 5))


@needs_onnx
@pytest.mark.parametrize("inputs", [INPUTS, {"image": INPUTS[0], "depth": INPUTS[1]}, (*INPUTS, 2.0)])
def test_several_inputs_by_position_and_by_name(inputs, tmp_path):
    made, failed = export_all(Pair(), inputs, tmp_path, ["onnx", "program"])
    assert failed == {} and [each["file"] for each in made] == ["model.onnx", "model.pt2"]
    assert all(each["batch_sizes"] == (1, 3, 4) and each["largest_difference"] < 1e-5 for each in made)
    assert {each.name: each.stat().st_size for each in tmp_path.iterdir()} == {
        each["file"]: each["n_bytes"] for each in made
    }


@needs_onnx
@pytest.mark.parametrize("kind", ["onnx", "program"])
def test_a_file_that_answers_otherwise_is_not_kept(pruned, tmp_path, monkeypatch, kind):
    """The network in the file has one weight changed."""
    write = export._exported

    def changed(model, example):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.linear.bias[3] += 5.0
        return write(other, example)

    monkeypatch.setattr(export, "_exported", changed)
    made, failed = export_all(*pruned, tmp_path, [kind])
    assert made == [] and "does not answer as the network does" in failed[kind] and not list(tmp_path.iterdir())


def test_exports_are_checked_by_name_and_package(monkeypatch):
    check_exports([])
    with pytest.raises(UserError, match=r"export has 'onx'; expected any of onnx, program"):
        check_exports(["onx"])
    monkeypatch.setattr(export, "RUNTIME", "onnxruntime_of_another_world")
    with pytest.raises(UserError, match=r"onnxruntime_of_another_world; .* pip install 'keepdrop\[onnx\]'"):
        check_exports(["onnx"])
    check_exports(["program"])


def test_what_cannot_be_exported_leaves_the_old_file(tmp_path):
    (tmp_path / "net.pt2").write_text("old")
    with pytest.raises(UserError, match="The network cannot be exported"):
        export_program(ZOO["Branching"](), torch.randn(2, 3, 8, 8), tmp_path / "net.pt2")
    assert (tmp_path / "net.pt2").read_text() == "old"


def test_a_full_disk_leaves_the_old_file(pruned, tmp_path, monkeypatch):
    (tmp_path / "net.pt2").write_text("old")

    def full(_program, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(UserError, match="No space left"):
        export_program(*pruned, tmp_path / "net.pt2")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("net.pt2", "old")]
