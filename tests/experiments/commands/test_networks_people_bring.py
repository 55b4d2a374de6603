"""Networks as people write and wrap them, from the command line and from Python: trained, pruned, saved, loaded."""

import json
import re

import keepdrop as package
import numpy as np
import pytest
import torch
from keepdrop.envs.data.sources import digits
from keepdrop.envs.files.pruned_network import load_pruned
from keepdrop.experiments.training.loop import TrainSettings, fit_network
from quick import QUICK
from zoo import Brought, MaxOverChannels, Noisy, Viewed, ViewedBySize, parallel

TARGET = [
    "target.removed=0.3",
    "network_search.masks=4",
    "network_search.images=60",
    "network_search.agent.updates=2",
    "repair.images=60",
    "repair.places=8",
    "recovery.train.epochs=0.3",
    "finetune.epochs=0.3",
    "latency.repeats=1",
    "latency.warmup=0",
    "evaluation.statistics_images=60",
]
pytestmark = pytest.mark.filterwarnings("ignore::keepdrop.errors.Notice")

BASE = ["base.epochs=2", "base.batch_size=16", "base.lr=0.05"]
SIZES = ["+network.in_channels=1", "+network.n_classes=10"]
TRAINED = {"recover": TrainSettings(epochs=0.3), "finetune": TrainSettings(epochs=0.3, distill_weight=0.5)}


TRAINING = TrainSettings(epochs=2, batch_size=16, lr=0.05)


def trained(make):
    """A network as a user has trained it."""
    torch.manual_seed(0)
    model, data = make(), digits().train
    model(data.batch(torch.arange(2))[0])  # lazy modules
    fit_network(model, data, TRAINING, seed=0)
    return model.eval()


def from_sizes(make):
    return lambda: make(1, 10)


@pytest.mark.parametrize("make", [Viewed, ViewedBySize, MaxOverChannels])
@pytest.mark.parametrize("target", [None, 0.3])
def test_one_memory_layout_from_python(make, target, tmp_path):
    data, make = digits(), from_sizes(make)
    call = {"drop_bound": 0.2, "settings": QUICK, "layers": ["conv1"] if target is None else None, **TRAINED}
    result = package.prune(trained(make), data.train, data.test, macs_removed=target, **call)
    assert result.notes == ()
    assert target is None or result.macs <= 0.7 * result.base_macs
    result.save(tmp_path)
    images = data.test.batch(torch.arange(4))[0]
    assert torch.equal(package.load_pruned(tmp_path, make)(images), result.model(images))
    assert len(result.latency((2,), repeats=1)) == 2


def test_one_memory_layout_on_colour_arrays(keepdrop, tmp_path, tiny):
    """Arrays n x height x width x 3 are channels-last as they come; those of one channel are of either order."""
    train, test = digits().train, digits().test
    arrays = {}
    for name, data, count in (("train", train, 600), ("test", test, 300)):
        grey = data.batch(torch.arange(count))[0][:, 0, :, :, None]
        tints = torch.tensor([1.0, 0.8, 0.6])
        arrays[f"x_{name}"] = ((grey - grey.min()) / (grey.max() - grey.min()) * tints * 255).byte().numpy()
        arrays[f"y_{name}"] = data.labels[:count].numpy()
    np.savez(tmp_path / "colour.npz", **arrays)
    brought = ["network=custom", "network._target_=zoo.Viewed", "+network.n_classes=10", "data=npz"]
    brought += ["data.path=colour.npz", "split.reward_size=100"]
    assert keepdrop("train-cnn", *brought, *BASE, "base.epochs=6", "run_dir=cnn").code == 0
    brought.append("checkpoint=cnn/model.safetensors")
    layers = [*tiny, "layers=[conv1]", "controls=[reconstruction]", "recovery.bn_images=50", "export=[program]"]
    assert keepdrop("prune", *brought, *layers, "run_dir=layers").code == 0
    # Long enough for a trial of the learning rate, beside the dense network as a teacher.
    whole = [*TARGET, "split.reward_size=100", "finetune.epochs=4", "finetune.batch_size=16"]
    assert keepdrop("prune", *brought, *whole, "run_dir=whole").code == 0
    at_rest = [
        "criterion=l2",
        "target.removed=0.1",
        "step=4",
        "minibatches=1",
        "finetune.epochs=0",
        "latency.repeats=1",
    ]
    assert keepdrop("iterate", *brought, *at_rest, "run_dir=steps").code == 0
    assert json.loads((tmp_path / "whole/metrics.json").read_text())["pruned_macs"] > 0
    load_pruned(tmp_path / "whole/pruned", lambda: Viewed(3, 10))


@pytest.mark.parametrize("name", ["Viewed", pytest.param("MaxOverChannels", marks=pytest.mark.slow)])
def test_one_memory_layout_from_the_command_line(keepdrop, tmp_path, tiny, name):
    network = ["network=custom", f"network._target_=zoo.{name}", *SIZES]
    assert keepdrop("train-cnn", *network, *BASE, "run_dir=cnn").code == 0
    brought = [*network, "checkpoint=cnn/model.safetensors"]
    assert keepdrop("prune", *brought, *tiny, "layers=[conv1]", "recovery.bn_images=50", "run_dir=layers").code == 0
    assert keepdrop("prune", *brought, *TARGET, "run_dir=whole").code == 0
    for run in ("layers", "whole"):
        metrics = json.loads((tmp_path / run / "metrics.json").read_text())
        assert metrics["latency"] and metrics["pruned_macs"] <= metrics["base_macs"]
        load_pruned(tmp_path / run / "pruned", from_sizes({"Viewed": Viewed, "MaxOverChannels": MaxOverChannels}[name]))
    rest = ["methods=[l1-uniform,reconstruction]", "targets.removed=[0.3]", "seeds=[0]", "stages=[bn,one]", "workers=1"]
    assert keepdrop("compare", *brought, *rest, "repair.images=50", "run_dir=compared").code == 0


def test_what_networks_bring_along_from_the_command_line(keepdrop, tmp_path, tiny):
    network = ["network=custom", "network._target_=zoo.parallel"]
    described = keepdrop("inspect", *network, "input_shape=[1,8,8]", "json=true")
    notes = json.loads(described.out)["notes"]
    assert [re.split(r" (?:of|came|got) ", note)[0] for note in notes] == ["The network", "Masks", "Lazy modules"]
    assert keepdrop("train-cnn", *network, *BASE, "run_dir=cnn").code == 0
    # As the user's own loop leaves it: masked, wrapped.
    torch.save({"state_dict": trained(parallel).state_dict()}, tmp_path / "theirs.pt")
    for checkpoint in ("cnn/model.safetensors", "theirs.pt"):
        result = keepdrop("prune", *network, f"checkpoint={checkpoint}", *tiny, f"run_dir=run-{checkpoint[:3]}")
        assert result.code == 0 and "The network came wrapped (DataParallel)" in result.out
        load_pruned(tmp_path / f"run-{checkpoint[:3]}/pruned", parallel)
    assert keepdrop("prune", f"resume=run-{checkpoint[:3]}", "network._target_=zoo.parallel").code == 0


def test_what_networks_bring_along_from_python(tmp_path):
    data = digits()
    for make, n_notes in ((Brought, 1), (parallel, 2)):
        network = trained(make)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        result = package.prune(network, data.train, data.test, drop_bound=0.2, settings=QUICK, **TRAINED)
        assert type(result.model) is Brought
        assert str(result).count("\n") == len(result.notes) == n_notes
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        result.save(tmp_path)
        loaded, images = package.load_pruned(tmp_path, make), data.test.batch(torch.arange(4))[0]
        assert torch.equal(loaded(images), result.model(images))


def test_a_random_network_is_said_to_be_one_and_can_be_loaded(keepdrop, tmp_path, tiny):
    network, said = ["network=custom", "network._target_=zoo.Noisy", *SIZES], "draws random numbers in evaluation mode"
    torch.save(trained(from_sizes(Noisy)).state_dict(), tmp_path / "noisy.pt")
    result = keepdrop("--quiet", "prune", *network, "checkpoint=noisy.pt", *tiny, "layers=[conv1]", "run_dir=run")
    assert result.code == 0 and f"warning: The network {said}" in result.err
    assert said in (tmp_path / "run/report.html").read_text()
    images = digits().test.batch(torch.arange(4))[0]
    assert load_pruned(tmp_path / "run/pruned", from_sizes(Noisy))(images).shape == (4, 10)
    data, call = digits(), {"drop_bound": 0.2, "settings": QUICK, "layers": ["conv1"], "finetune": None}
    assert said in package.prune(trained(from_sizes(Noisy)), data.train, data.test, **call).notes[0]
