"""Zoo files: what they hold, every mistake as one sentence, and no code that nobody allowed."""

import pytest
import torch
from keepdrop.errors import UserError
from keepdrop.experiments.config.schema import SplitConfig
from keepdrop.experiments.pretraining.zoo import read_zoo
from tiny_zoo import entry, write_zoo


def refused(file, *modules):
    with pytest.raises(UserError) as caught:
        read_zoo(str(file), modules)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_networks_with_their_weights_and_images(tmp_path):
    file = write_zoo(tmp_path)
    one, two = read_zoo(str(file), [])
    assert (one.name, one.family, two.name) == ("one", "family one", "two")
    model = one.load()
    assert not model.training and model.conv1.out_channels == 4
    splits = one.splits(SplitConfig("test", 50), 30)
    assert len(splits.fit) == 30 and len(splits.reward) == 50
    assert model(splits.example).shape == (1, 10)


def test_weights_may_come_with_the_function(tmp_path):
    found = entry("one", tmp_path)
    del found["checkpoint"]
    assert read_zoo(str(write_zoo(tmp_path, found)), [])[0].checkpoint is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {name: [", "cannot be read"),
        ("word", "cannot be read|holds no list"),
        ("name: one", "holds no list; expected one network per entry"),
        ("[]", "holds no list"),
        ("- one", "Network 1 of the zoo file .* is str; expected checkpoint, data, family, name, network"),
        ("- ${nothing}", "cannot be read"),
    ],
)
def test_files_that_are_no_zoo(tmp_path, text, said):
    (tmp_path / "zoo.yaml").write_text(text)
    import re

    assert re.search(said, refused(tmp_path / "zoo.yaml"))


def test_files_that_are_not_there(tmp_path):
    assert "There is no zoo file" in refused(tmp_path / "none.yaml")
    assert "cannot be read" in refused(tmp_path)
    (tmp_path / "zoo.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(tmp_path / "zoo.yaml")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"weights": 1}, "has 'weights'; expected checkpoint, data, family, name, network"),
        ({"checkpoint": "nothing.pt"}, "has the checkpoint .*nothing.pt', which does not exist"),
        ({"name": "../../etc"}, "is called '../../etc'; expected letters, digits"),
        ({"name": ".hidden"}, "is called '.hidden'"),
        ({"name": ""}, "is called ''"),
        ({"name": "a/b"}, "is called 'a/b'"),
        ({"network": "resnet20"}, "has a network without _target_"),
        ({"data": {"path": "x.npz"}}, "has a data without _target_"),
    ],
)
def test_entries_that_cannot_be(tmp_path, changed, said):
    import re

    assert re.search(said, refused(write_zoo(tmp_path, {**entry("one", tmp_path), **changed})))


@pytest.mark.parametrize("key", ["name", "family", "network", "data"])
def test_entries_that_lack_something(tmp_path, key):
    found = entry("one", tmp_path)
    del found[key]
    assert f"has no '{key}'; expected data, family, name, network" in refused(write_zoo(tmp_path, found))


def test_one_name_twice(tmp_path):
    found = entry("one", tmp_path)
    assert "has two networks called 'one'" in refused(write_zoo(tmp_path, found, found))


@pytest.mark.parametrize("where", ["network", "data", "deep"])
def test_code_of_others_runs_only_where_its_module_is_named(tmp_path, monkeypatch, where):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "foreign_zoo.py").write_text(
        "import pathlib\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from keepdrop.envs.networks.built_in import small_cnn as make\n"
    )
    foreign = {"_target_": "foreign_zoo.make", "widths": [4, 5, 6]}
    found = entry("one", tmp_path)
    if where == "deep":
        found["network"] = {**found["network"], "widths": [{"_target_": "foreign_zoo.make"}]}
    else:
        found[where] = foreign
    file = write_zoo(tmp_path, found)
    said = refused(file)
    assert "calls 'foreign_zoo.make', which is not keepdrop's; if it may run, add modules=[foreign_zoo]" in said
    assert "calls 'foreign_zoo.make'" in refused(file, "foreign")
    assert not (tmp_path / "ran").exists()
    network = read_zoo(str(file), ["foreign_zoo"])[0]
    assert not (tmp_path / "ran").exists()
    if where == "network":
        assert network.load()(torch.zeros(1, 1, 8, 8)).shape == (1, 10) and (tmp_path / "ran").exists()
