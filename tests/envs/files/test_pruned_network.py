"""A pruned network survives its file: same outputs in a fresh process, and no damage goes unnoticed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from blocks import MAKERS, trained_looking
from keepdrop.envs.files import pruned_network as pruned_file
from keepdrop.envs.files.pruned_network import load_pruned, save_pruned
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.groups.verification import randomised
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.kept_channels import KeptChannels
from keepdrop.errors import UserError
from safetensors.torch import load_file
from torch import nn
from zoo import IMAGES, ZOO

RESNET = {"_target_": "keepdrop.envs.networks.built_in.cifar_resnet", "depth": 8}


def _pruned(make, shape, steps=2):
    """Prune in `steps` rounds, planning anew each time."""
    generator = torch.Generator().manual_seed(11)
    model = randomised(make(), generator).float()
    images = torch.randn(shape, generator=generator)
    kept = KeptChannels()
    for _ in range(steps):
        choices = {}
        for group in find_groups(model, images, verify=False).groups:
            keep = torch.rand(group.n_filters, generator=generator) < 0.8
            keep[0] = True
            choices[group] = keep
        kept = kept.after(model, choices)
        model = prune(model, choices)
    return model.eval(), kept, images


@pytest.fixture
def saved(tmp_path):
    model, kept, images = _pruned(lambda: cifar_resnet(8), (2, 3, 16, 16))
    save_pruned(model, tmp_path / "net", kept=kept, constructor=RESNET, facts={"accuracy": 0.9})
    with torch.no_grad():
        return tmp_path / "net", model, kept, images, model(images)


@pytest.mark.parametrize("counted", [("dense", "loaded"), ("dense",), ("loaded",)])
def test_counters_that_a_profiler_left_do_not_stand_in_the_way(counted, tmp_path):
    def profiled(model):
        for module in model.modules():
            module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
            module.register_buffer("total_params", torch.ones(1, dtype=torch.float64))
        return model

    def make(when):
        return profiled(ZOO["Concat"]()) if when in counted else ZOO["Concat"]()

    model, kept, images = _pruned(lambda: make("dense"), IMAGES)
    save_pruned(model, tmp_path, kept=kept)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "total_" in name]
    loaded = load_pruned(tmp_path, lambda: make("loaded"))
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("name", ZOO)
def test_round_trip_of_every_kind_of_network(name, tmp_path):
    model, kept, images = _pruned(ZOO[name], IMAGES)
    save_pruned(model, tmp_path, kept=kept)
    loaded = load_pruned(tmp_path, ZOO[name])
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert {k: v.shape for k, v in loaded.named_parameters()} == {k: v.shape for k, v in model.named_parameters()}


def test_loads_in_a_fresh_process_without_torch_pruning(saved):
    folder, _, _, images, expected = saved
    torch.save(images, folder / "images.pt")
    code = (
        "import sys, torch; sys.modules['torch_pruning'] = None\n"
        "from keepdrop.envs.files.pruned_network import load_pruned\n"
        f"net = load_pruned({str(folder)!r})\n"
        f"images = torch.load({str(folder / 'images.pt')!r}, weights_only=True)\n"
        f"torch.set_num_threads(1); torch.save(net(images).detach(), {str(folder / 'out.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert torch.allclose(torch.load(folder / "out.pt", weights_only=True), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_vanished_blocks_come_back_in_the_user_s_own_class(name, tmp_path):
    dense = trained_looking(MAKERS[name])
    images = torch.randn(2, 3, 13, 13, generator=torch.Generator().manual_seed(3))
    groups = find_groups(dense, images, whole_blocks=True).groups
    choices = {group: torch.arange(group.n_filters) % 3 != 1 for group in groups}
    first = next(group for group in groups if group.least == 0)
    inner = [group for group in groups if group.branch == first.branch]
    choices |= {group: torch.zeros(group.n_filters, dtype=torch.bool) for group in inner}
    model, kept = prune(dense, choices), KeptChannels().after(dense, choices)
    again = {group: torch.arange(group.n_filters) % 4 != 2 for group in find_groups(model, images).groups}
    model, kept = prune(model, again), kept.after(model, again)
    save_pruned(model, tmp_path, kept=kept, input_shape=(1, 3, 13, 13))
    with pytest.raises(UserError, match="is not called from a file"):
        load_pruned(tmp_path)
    loaded = load_pruned(tmp_path, MAKERS[name])
    assert torch.equal(loaded(images), model(images))
    assert type(loaded.blocks[0]) is type(dense.blocks[0])


def test_vanished_blocks_in_a_fresh_process(tmp_path):
    torch.manual_seed(1)
    dense = cifar_resnet(8, widths=(4, 6, 8)).eval()
    images = torch.ones(1, 3, 8, 8)
    gone = {
        group: torch.zeros(group.n_filters, dtype=torch.bool)
        for group in find_groups(dense, images, whole_blocks=True).groups
        if group.least == 0
    }
    model = prune(dense, gone)
    constructor = {"_target_": "keepdrop.envs.networks.built_in.cifar_resnet", "depth": 8, "widths": [4, 6, 8]}
    kept = KeptChannels().after(dense, gone)
    save_pruned(model, tmp_path, kept=kept, constructor=constructor, input_shape=(1, 3, 8, 8))
    code = (
        "import sys, torch; from keepdrop.envs.files.pruned_network import load_pruned\n"
        "print(load_pruned(sys.argv[1])(torch.ones(1, 3, 8, 8)).double().flatten().tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == model(images).double().flatten().tolist()


def test_kept_channels_are_those_of_the_dense_network():
    dense = small_cnn()
    with torch.no_grad():
        dense.conv2.weight.copy_(torch.arange(16.0)[:, None, None, None].expand_as(dense.conv2.weight))
    kept, model = KeptChannels(), dense
    for step in (torch.arange(16) % 2 == 0, torch.arange(8) % 3 > 0):
        group = find_groups(model, torch.randn(1, 1, 8, 8), verify=False).groups[1]
        kept, model = kept.after(model, {group: step}), prune(model, {group: step})
    assert kept.as_lists()["conv2"]["out"] == [2, 4, 8, 10, 14]
    assert kept.as_lists()["conv3"]["in"] == kept.as_lists()["bn2"]["out"] == [2, 4, 8, 10, 14]
    assert model.conv2.weight[:, 0, 0, 0].tolist() == [2.0, 4, 8, 10, 14]
    assert "conv1" not in kept.rows and kept.widths["conv2"] == {"out": 16} == kept.widths["bn2"]


def test_further_training_and_plain_state_dicts(saved):
    folder, model, kept, images, _ = saved
    loaded = load_pruned(folder)
    loaded.train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.01)
    loaded(images).square().mean().backward()
    optimizer.step()
    again = load_pruned(folder)
    again.load_state_dict(loaded.state_dict(), strict=True)
    save_pruned(loaded, folder, kept=kept, constructor=RESNET)
    with torch.no_grad():
        assert torch.equal(load_pruned(folder)(images), loaded.eval()(images))
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())


def test_half_precision_stays(tmp_path):
    model, kept, _ = _pruned(small_cnn, (1, 1, 8, 8))
    save_pruned(model.bfloat16(), tmp_path, kept=kept)
    assert load_pruned(tmp_path, small_cnn).conv1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("constructor", "message"),
    [
        (lambda: cifar_resnet(14), r"does not fit the file: 'layer1.1.conv1.weight' is float32 \(16, \d+, 3, 3\)"),
        (
            lambda: cifar_resnet(8, n_classes=7),
            r"'linear.weight' is float32 \(7, \d+\) .* but float32 \(10,",
        ),
        (small_cnn, "has no module 'layer1.0.conv1'; was it built by another constructor"),
        (lambda: cifar_resnet(8, widths=(8, 16, 32)), "'conv1' has 8 'out' channels, but had 16 before pruning"),
        # Cut to the same channels it would have the same shapes, and another shortcut.
        (lambda: cifar_resnet(8, widths=(32, 32, 64)), "'conv1' has 32 'out' channels, but had 16 before pruning"),
        (lambda: None, "returned a NoneType, expected a module"),
        (lambda: 1 / 0, r"constructor of the dense network fails \(ZeroDivisionError"),
    ],
)
def test_another_constructor_names_the_first_mismatch(saved, constructor, message):
    with pytest.raises(UserError, match=message):
        load_pruned(saved[0], constructor)


class Small(nn.Module):
    """Two convolutions; the same shapes whatever the options."""

    def __init__(self, stride=1, act=torch.relu):
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(3, 8, 3, stride=stride), nn.Conv2d(8, 5, 3), act

    def forward(self, images):
        return self.act(self.b(self.act(self.a(images)))).mean((2, 3))


def test_a_constructor_that_differs_in_no_shape_is_noticed(tmp_path):
    model, images = Small().double(), torch.randn(1, 3, 9, 9, dtype=torch.float64)
    (group,) = find_groups(model, images).groups
    keep = torch.arange(8) % 3 > 0
    kept, pruned = KeptChannels().after(model, {group: keep}), prune(model, {group: keep})
    save_pruned(pruned, tmp_path, kept=kept, input_shape=images.shape)
    assert torch.equal(load_pruned(tmp_path, Small)(images), pruned(images))
    for other in (lambda: Small(stride=2), lambda: Small(act=torch.tanh)):
        with pytest.raises(UserError, match="has the shapes of the file and answers otherwise"):
            load_pruned(tmp_path, other)
    with pytest.raises(UserError, match=r"does not run on the file's probe \[1, 3, 9, 9\]"):
        load_pruned(tmp_path, lambda: Small(act=None))
    save_pruned(pruned, tmp_path, kept=kept)
    load_pruned(tmp_path, lambda: Small(stride=2))
    with torch.no_grad():
        pruned.b.bias += torch.nan
    save_pruned(pruned, tmp_path, kept=kept, input_shape=images.shape)
    assert json.loads((tmp_path / "architecture.json").read_text())["probe"] is None


def test_a_file_does_not_choose_what_code_runs(saved, tmp_path):
    _, model, kept, _, _ = saved
    save_pruned(model, tmp_path / "evil", kept=kept, constructor={"_target_": "os.system", "command": "true"})
    with pytest.raises(UserError, match=r"names 'os.system' as the constructor .* pass it yourself"):
        load_pruned(tmp_path / "evil")
    save_pruned(model, tmp_path / "none", kept=kept)
    with pytest.raises(UserError, match="names None as the constructor"):
        load_pruned(tmp_path / "none")


def test_missing_and_mixed_files(saved, tmp_path):
    folder, model, kept, _, _ = saved
    with pytest.raises(UserError, match=r"Cannot read .*architecture.json: No such file"):
        load_pruned(tmp_path / "nowhere")
    save_pruned(model, tmp_path / "run/pruned", kept=kept, constructor=RESNET)
    with pytest.raises(UserError, match=r"run' is the folder of a run; give its pruned network, '.*run/pruned'\."):
        load_pruned(tmp_path / "run")
    with torch.no_grad():
        model.linear.bias += 1
    save_pruned(model, tmp_path / "other", kept=kept, constructor=RESNET)
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors is damaged, or belongs to another architecture.json"):
        load_pruned(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"Cannot read .*model.safetensors"):
        load_pruned(folder)


@pytest.mark.parametrize("name", ["architecture.json", "model.safetensors"])
def test_no_damage_goes_unnoticed(saved, name):
    folder, _, _, images, expected = saved
    good = (folder / name).read_bytes()
    random = np.random.default_rng(0)
    header = 2000 if name == "model.safetensors" else len(good)
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        kind, place = random.integers(3), int(random.integers(min(header, len(good))))
        if kind == 0:
            bad[place] = int(random.integers(256))
        elif kind == 1:
            del bad[place : place + int(random.integers(1, 50))]
        else:
            bad = bad[:place]
        (folder / name).write_bytes(bytes(bad))
        try:
            loaded = load_pruned(folder)
        except UserError:
            refused += 1
            continue
        # Only versions, facts and white space may change without a complaint.
        with torch.no_grad():
            assert torch.allclose(loaded(images), expected, rtol=1e-5, atol=1e-5)
    assert refused > (100 if name == "architecture.json" else 140)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"format_version": 2}', "[" * 100_000, '{"format_version": NaN}', "\ud800"]
)
def test_odd_json(saved, text):
    (saved[0] / "architecture.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"architecture.json (is not JSON|has format version|is damaged)"):
        load_pruned(saved[0])


@pytest.mark.parametrize(
    "kept", [None, 3, {"conv1": 3}, {"conv1": {"out": "all"}}, {"conv1": {"out": [True] * 16}}, []]
)
def test_well_signed_nonsense_is_refused_too(saved, kept):
    path = saved[0] / "architecture.json"
    core = json.loads(path.read_text())
    core["kept"] = kept
    core["checksum"] = pruned_file._checksum({name: core[name] for name in pruned_file.SIGNED})
    path.write_text(json.dumps(core))
    with pytest.raises(UserError):
        load_pruned(saved[0])


def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="constructor and facts of a pruned network must be JSON"):
        save_pruned(nn.Linear(2, 2), tmp_path, kept=KeptChannels(), facts={"net": object()})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_files(saved, monkeypatch):
    folder, model, kept, images, expected = saved

    def full(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with torch.no_grad():
        model.linear.bias += 1
    with pytest.raises(UserError, match=r"No space left on device.*intact"):
        save_pruned(model, folder, kept=kept, constructor=RESNET)
    assert sorted(path.name for path in folder.iterdir()) == ["architecture.json", "model.safetensors"]
    with torch.no_grad():
        assert torch.equal(load_pruned(folder)(images), expected)
