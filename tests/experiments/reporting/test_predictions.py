"""Pictures of what a segmentation network answers: the files, the section, and runs that have none."""

import base64
import json
import struct
import zlib

import pytest
import torch
from keepdrop.envs.data.images import ArrayImages
from keepdrop.envs.data.metrics import Dice, MeanIoU
from keepdrop.envs.data.objective import Objective, with_objective
from keepdrop.experiments.reporting.predictions import png, predictions, write_predictions
from keepdrop.experiments.reporting.run_data import read_run
from keepdrop.experiments.runs.folder import RunFolder
from torch import nn


def pixels_of(encoded):
    """Height, width and rows of an unfiltered RGB PNG, checksums and all."""
    content, parts, at = base64.b64decode(encoded), {}, 8
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(content):
        (length,), kind = struct.unpack(">I", content[at : at + 4]), content[at + 4 : at + 8]
        body = content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        parts[kind], at = body, at + 12 + length
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    rows = zlib.decompress(parts[b"IDAT"])
    lines = [rows[i * (3 * width + 1) + 1 : (i + 1) * (3 * width + 1)] for i in range(height)]
    return torch.tensor([list(line) for line in lines], dtype=torch.uint8).view(height, width, 3)


class Thresholds(nn.Module):
    """Class 1 where the image is above a half, class 2 above 0.9; `out` channels of logits."""

    def __init__(self, out, scale=1.0):
        super().__init__()
        self.out, self.weight = out, nn.Parameter(torch.tensor([scale]))

    def forward(self, x):
        x = self.weight * x
        if self.out == 1:
            return x - 0.5
        return torch.cat([0.5 - x, (x - 0.5).clamp(max=0.2), x - 0.8], 1)[:, : self.out]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("order: forward\n")
    return RunFolder(tmp_path / "run")


def images(targets, objective, channels=1):
    values = torch.linspace(0, 1, 8 * 4 * 6).view(8, 1, 4, 6).expand(-1, channels, -1, -1).contiguous()
    return with_objective(ArrayImages(values, targets, [0.0] * channels, [1.0] * channels, 0), objective)


def test_pictures_are_what_the_networks_answer(folder):
    truth = torch.randint(3, (8, 4, 6), generator=torch.Generator().manual_seed(0))
    data = images(truth, Objective(MeanIoU()))
    networks = {"dense": Thresholds(3), "pruned": Thresholds(3, 0.7)}
    write_predictions(networks, data, folder)
    rows = json.loads((folder.path / "predictions.json").read_text())["images"]
    assert [row["index"] for row in rows] == [0, 1, 2, 4, 5, 7]
    colours = {}
    for row in rows:
        given, answers = data.batch(torch.tensor([row["index"]]))[0], row["answers"]
        for name, network in networks.items():
            logits, shown = network(given), pixels_of(answers[name]["map"])
            assert answers[name]["score"] == pytest.approx(float(MeanIoU()(logits, truth[[row["index"]]])), abs=1e-6)
            for kind, pixel in zip(logits.argmax(1).flatten().tolist(), shown.view(-1, 3).tolist(), strict=True):
                assert colours.setdefault(kind, pixel) == pixel
        for kind, pixel in zip(
            truth[row["index"]].flatten().tolist(), pixels_of(row["truth"]).view(-1, 3).tolist(), strict=True
        ):
            assert colours.setdefault(kind, pixel) == pixel
        assert pixels_of(row["picture"])[0, 0].tolist() == [0, 0, 0]
    assert len({tuple(each) for each in colours.values()}) == 3


def test_a_mask_of_one_logit_and_a_network_that_trains_stay_what_they_are(folder):
    network = Thresholds(1).train()
    write_predictions({"dense": network}, images(torch.ones(8, 1, 4, 6), Objective(Dice(), binary=True)), folder)
    rows = json.loads((folder.path / "predictions.json").read_text())["images"]
    assert len(rows) == 6 and network.training
    assert len(pixels_of(rows[-1]["answers"]["dense"]["map"]).view(-1, 3).unique(dim=0)) == 1
    assert rows[0]["answers"]["dense"]["score"] == 0.0 and rows[-1]["answers"]["dense"]["score"] == 1.0


@pytest.mark.parametrize("targets", [torch.rand(8, 4, 6), torch.zeros(8, dtype=torch.int64), torch.rand(8, 1)])
def test_other_targets_than_maps_have_no_pictures(folder, targets):
    write_predictions({"dense": Thresholds(1)}, images(targets, Objective(MeanIoU())), folder)
    assert not (folder.path / "predictions.json").exists()


def test_large_pictures_are_thinned_out():
    assert pixels_of(png(torch.zeros(700, 300, 3, dtype=torch.uint8))).shape == (234, 100, 3)


def test_the_report_shows_them_and_nothing_where_there_are_none(folder):
    assert predictions(read_run(folder.path)) is None
    write_predictions({"dense": Thresholds(3)}, images(torch.zeros(8, 4, 6).long(), Objective(MeanIoU())), folder)
    shown = str(predictions(read_run(folder.path)))
    assert shown.count('<img src="data:image/png;base64,') == 18 and "classes by the dense network" in shown
