"""Checkpoints: what loads, what is refused with which sentence, and that a refusal leaves the model as it was."""

import argparse
import errno
import os
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from keepdrop.atomic import write_atomically
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.networks.checkpoint import hash_state, load_checkpoint, save_weights
from keepdrop.errors import UserError
from safetensors.torch import save_file
from torch import nn

CHECKPOINTS = Path(__file__).parents[3].parent / "shared" / "checkpoints"


class Payload:
    """A class of the user's: unpickling it would run its code."""


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small_cnn(widths=(2, 2, 3, 3, 4))


@pytest.fixture
def other():
    torch.manual_seed(1)
    return small_cnn(widths=(2, 2, 3, 3, 4))


def refusal(model, path, **kwargs):
    """The sentence load_checkpoint refuses with, after checking that the model is bitwise what it was."""
    before = hash_state(model)
    with pytest.raises(UserError) as caught:
        load_checkpoint(model, path, **kwargs)
    assert hash_state(model) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


WRAPS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "best_prec1": 91.7},
    "model": lambda state: {"model": state, "epoch": 3},
    "data_parallel": lambda state: {"state_dict": OrderedDict((f"module.{k}", v) for k, v in state.items())},
    "compiled": lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    "compiled_part": lambda state: {k.replace("conv2.", "conv2._orig_mod."): v for k, v in state.items()},
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in state.items()}},
    "ema": lambda state: {"state_dict_ema": state},
    "lightning": lambda state: {"state_dict": {f"net.{k}": v for k, v in state.items()}, "epoch": 3},
    "with_a_loss": lambda state: {**{f"net.{k}": v for k, v in state.items()}, "loss.weight": torch.ones(3)},
    "ema_and_online": lambda state: {
        **{f"online_model.module.{k}": 0 * v for k, v in state.items()},
        **{f"ema_model.module.{k}": v for k, v in state.items()},
        "initted": torch.tensor(1),
    },
    "masked": lambda state: {
        **{k.replace("conv2.weight", "conv2.weight_orig"): v for k, v in state.items()},
        "conv2.weight_mask": torch.ones_like(state["conv2.weight"]),
    },
    "thop": lambda state: state | {"total_ops": torch.zeros(1), "conv1.total_params": torch.zeros(1)},
    "without_counters": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_loads_bitwise_through_every_wrapping(tmp_path, model, other, wrap):
    torch.save(WRAPS[wrap](other.state_dict()), tmp_path / "weights.pt")
    load_checkpoint(model, tmp_path / "weights.pt")
    assert hash_state(model) == hash_state(other)


WRAPPED = {
    "parallel": nn.DataParallel,
    "own": lambda model: nn.Sequential(OrderedDict(module=model)),
    "own_name": lambda model: nn.Sequential(OrderedDict(backbone=model)),
    "twice": lambda model: nn.DataParallel(nn.DataParallel(model)),
    "plain": lambda model: model,
}


@pytest.mark.parametrize("theirs", WRAPPED)
@pytest.mark.parametrize("ours", WRAPPED)
def test_wrapped_networks_load_each_others_files(tmp_path, model, other, ours, theirs):
    model, other = WRAPPED[ours](model), WRAPPED[theirs](other)
    save_weights(other, tmp_path / "weights.safetensors")
    load_checkpoint(model, tmp_path / "weights.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_masks_of_prune_are_multiplied_in(tmp_path, model, other):
    nn.utils.prune.random_unstructured(other.conv2, "weight", 0.5)
    torch.save(other.state_dict(), tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt")
    assert torch.equal(model.conv2.weight, other.conv2.weight) and (model.conv2.weight == 0).any()


def test_two_networks_that_fit_are_refused(tmp_path, model, other):
    state = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in other.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    assert "holds 2 networks that fit (student, teacher); save the state dict of one" in refusal(
        model, tmp_path / "w.pt"
    )


def test_loads_legacy_torch_format(tmp_path, model, other):
    torch.save(other.state_dict(), tmp_path / "weights.th", _use_new_zipfile_serialization=False)
    load_checkpoint(model, tmp_path / "weights.th")
    assert hash_state(model) == hash_state(other)


def test_save_weights_and_load_are_inverse(tmp_path, model, other):
    save_weights(other.to(memory_format=torch.channels_last), tmp_path / "new" / "weights.safetensors")
    load_checkpoint(model, tmp_path / "new" / "weights.safetensors")
    assert hash_state(model) == hash_state(other)


def test_save_weights_takes_tied_weights(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_weights(model, tmp_path / "tied.safetensors")
    before = hash_state(model)
    load_checkpoint(model, tmp_path / "tied.safetensors")
    assert hash_state(model) == before


def test_key_names_the_entry(tmp_path, model, other):
    torch.save({"ema": other.state_dict(), "model": model.state_dict()}, tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt", key="ema")
    assert hash_state(model) == hash_state(other)
    assert "has no entry 'emma'; it holds: ema, model" in refusal(model, tmp_path / "w.pt", key="emma")


def test_missing_file(tmp_path, model):
    assert (
        refusal(model, tmp_path / "gone.pt") == f"Checkpoint '{tmp_path / 'gone.pt'}' does not exist; check the path."
    )
    assert "is not a file; give the path of a .pt" in refusal(model, tmp_path)


@pytest.mark.parametrize("name", ["w.pt", "legacy.th", "w.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(tmp_path, model, other, name, kept):
    path = tmp_path / name
    if name == "w.safetensors":
        save_file(other.state_dict(), path)
    else:
        torch.save(other.state_dict(), path, _use_new_zipfile_serialization=name == "w.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert "is truncated or not a torch or safetensors file; copy it again." in refusal(model, path)


@pytest.mark.parametrize("content", [b"hello, not weights at all", b"\x80\x04garbage", os.urandom(4096), b"{}" * 99])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_garbage_file(tmp_path, model, content, name):
    (tmp_path / name).write_bytes(content)
    assert "is truncated or not a torch or safetensors file" in refusal(model, tmp_path / name)


@pytest.mark.parametrize("content", [Payload(), {"state_dict": {}, "args": Payload()}, small_cnn(widths=(1,))])
def test_checkpoint_that_wants_unpickling(tmp_path, model, content):
    torch.save(content, tmp_path / "w.pt")
    text = refusal(model, tmp_path / "w.pt")
    assert "holds pickled Python objects, which can run any code while loading, so it is refused" in text
    assert text.endswith("save only the weights with torch.save(model.state_dict(), path).")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], torch.zeros(3), {"state_dict": {}}])
def test_file_without_a_state_dict(tmp_path, model, content):
    torch.save(content, tmp_path / "w.pt")
    assert "holds no state dict (a mapping from names to tensors)" in refusal(model, tmp_path / "w.pt")


@pytest.mark.parametrize("content", [
    lambda own: {"generator": own, "discriminator": {"x": torch.ones(2)}},
    lambda own: {"params": own, "params_ema": {name: 0.5 * value for name, value in own.items()}},
    lambda own: {"best": {f"module.{name}": value for name, value in own.items()}, "epoch": 3},
    lambda own: {"model": own, "args": argparse.Namespace(lr=0.1, layers=[1, 2])},
])  # fmt: skip
def test_the_one_entry_that_fits(tmp_path, model, other, content):
    torch.save(content(other.state_dict()), tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt")
    assert hash_state(model) == hash_state(other)


def test_two_entries_that_fit_are_named(tmp_path, model, other):
    torch.save({"teacher": other.state_dict(), "student": other.state_dict()}, tmp_path / "w.pt")
    assert "holds 2 networks that fit (teacher, student)" in refusal(model, tmp_path / "w.pt")


def test_files_that_are_no_checkpoints_are_named(tmp_path, model):
    torch.jit.trace(model.eval(), torch.zeros(1, 1, 8, 8)).save(tmp_path / "script.pt")
    assert "is a TorchScript archive" in refusal(model, tmp_path / "script.pt")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "is a pointer of Git LFS, not the weights" in refusal(model, tmp_path / "lfs.pt")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>Quota exceeded</html>")
    assert "is a web page, not the weights" in refusal(model, tmp_path / "page.safetensors")


def test_wrong_architecture_names_keys_and_shapes(tmp_path, model):
    torch.save(cifar_resnet(20).state_dict(), tmp_path / "w.pt")
    text = refusal(model, tmp_path / "w.pt")
    assert text.startswith(f"Checkpoint '{tmp_path / 'w.pt'}' is for another architecture; keys: ")
    assert "missing (conv2.weight, bn2.weight, bn2.bias and 17 more)" in text
    assert "108 not in the model (layer1.0.conv1.weight, " in text
    assert "conv1.weight is (16, 3, 3, 3), the model has (2, 1, 3, 3)" in text


def test_nan_weights(tmp_path, model, other):
    with torch.no_grad():
        other.conv2.weight[0, 0, 0, 0] = torch.nan
    save_weights(other, tmp_path / "w.safetensors")
    assert "holds NaN or infinite values in conv2.weight; its training diverged." in refusal(
        model, tmp_path / "w.safetensors"
    )


def test_full_disk_leaves_the_old_file(tmp_path, model, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(model, path)
    before = path.read_bytes()

    def no_space(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=re.escape("(No space left on device); what was there before is intact")):
        write_atomically(path, b"new")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_hash_sees_every_bit_and_nothing_else(model):
    before = hash_state(model)
    model.eval().requires_grad_(False)
    assert hash_state(model.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        model.linear.bias[0] = torch.nextafter(model.linear.bias[0], torch.tensor(9.0))
    assert hash_state(model) != before


@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="the published checkpoints are not beside this repository")
@pytest.mark.parametrize(("name", "depth"), [("resnet20-a", 20), ("resnet20-b", 20), ("resnet56-a", 56)])
def test_published_checkpoints_load(name, depth):
    model = cifar_resnet(depth)
    before = hash_state(model)
    load_checkpoint(model, CHECKPOINTS / f"{name}.th")
    assert hash_state(model) != before


@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="the published checkpoints are not beside this repository")
def test_published_checkpoint_of_another_depth_is_refused():
    text = refusal(cifar_resnet(20), CHECKPOINTS / "resnet56-a.th")
    assert "180 not in the model (layer1.3.conv1.weight" in text
