"""`keepdrop inspect`: what it shows, in a table and as JSON, for images and for anything else a forward takes."""

import json
import sys

import pytest

NETWORKS = """
import torch
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.middle = nn.Conv2d(3, 6, 1), nn.Conv2d(1, 6, 1), nn.Conv2d(6, 8, 1)
        self.linear = nn.Linear(8, 2)

    def forward(self, image, *, depth):
        return self.linear(self.middle((self.left(image) + self.right(depth)).relu()).relu().mean((2, 3)))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.linear = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 6, 3), nn.Linear(6, 10)

    def forward(self, images):
        y = self.body(self.stem(images).relu()).relu()
        return self.linear((-y if images.mean() > 0.1 else y).mean((2, 3)))


def example():
    return {"image": torch.randn(2, 3, 4, 4), "depth": torch.randn(2, 1, 4, 4)}


def number():
    return 3
"""


@pytest.fixture
def mine(tmp_path, request):
    name = f"inspected_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(NETWORKS)
    yield name
    sys.modules.pop(name, None)


def test_json_is_what_the_table_shows(keepdrop):
    result = keepdrop("inspect", "--json")
    described = json.loads(result.out)
    assert result.code == 0 and [row["name"] for row in described["groups"]][:2] == ["conv1", "conv2"]
    assert described["macs"] == 452_224 and described["params"] == 35_674
    assert described["groups"][0]["consumers"] == ["conv2"] and described["groups"][0]["n_filters"] == 16
    assert described["evaluation"] == {"method": "split", "reason": ""} and described["notes"] == []
    assert json.loads(keepdrop("inspect", "json=true").out) == described
    table = keepdrop("inspect").out
    assert "452,224 MACs, 35,674 parameters" in table and "masks" not in table
    assert all(f"{row['macs']:,}" in table and row["name"] in table for row in described["groups"])


def test_several_inputs(keepdrop, mine):
    network = ("network=custom", f"network._target_={mine}.Two")
    result = keepdrop("inspect", *network, f"example_inputs={mine}.example", "--json")
    described = json.loads(result.out)
    assert [row["name"] for row in described["groups"]] == ["left", "middle"]
    assert described["groups"][0]["coupled_with"] == ["right"] and described["macs"] == 16 * (18 + 6 + 48) + 16
    assert described["evaluation"] == {"method": "split", "reason": ""}
    assert "left" in keepdrop("inspect", *network, f"example_inputs={mine}.example").out


def test_a_network_that_looks_at_its_data_is_said_to(keepdrop, mine):
    out = keepdrop("inspect", "network=custom", f"network._target_={mine}.Branch").out
    assert "masks run through the whole network, every one anew: the network cannot be split" in out
    assert "warning: The network looks at the values of its data" in out


def test_names_are_not_broken_on_a_narrow_terminal(keepdrop, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    out = keepdrop("inspect", "network=resnet20", "input_shape=[3,16,16]").out
    assert all(f" layer{stage}.{block}.conv1 " in out for stage in (1, 2, 3) for block in (0, 1, 2))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ((), "missing 1 required keyword-only argument: 'depth'); give the shape of your images"),
        (("example_inputs={mine}.number",), "example_inputs returned int; expected a tensor with the batch axis first"),
        (("example_inputs=nowhere.f",), "example_inputs could not be built from nowhere.f: ModuleNotFoundError"),
        (("input_shape=[]",), "input_shape is []; expected the channels, height and width of one image"),
        (("input_shape=[3,0,4]",), "input_shape is 0; expected a number from 1 to 1,000,000"),
    ],
)
def test_what_it_cannot_run_on(keepdrop, mine, settings, sentence):
    settings = [each.format(mine=mine) for each in settings]
    result = keepdrop("inspect", "network=custom", f"network._target_={mine}.Two", *settings)
    assert result.code == 2 and result.out == "" and sentence in result.err and result.err.count("\n") == 1
