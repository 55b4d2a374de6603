"""The oracle against networks that are cut for real, the correlation against scipy's, and the command."""

import csv
import json
from pathlib import Path

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet
from keepdrop.envs.surgery.cutting import prune
from keepdrop.experiments.oracle.correlations import correlation_rows, spearman
from keepdrop.experiments.oracle.single_removals import filter_oracle
from page import Checker
from torch.nn import functional


def test_oracle_is_the_network_without_the_filter():
    torch.manual_seed(0)
    model = cifar_resnet(8, widths=(4, 6, 8)).eval()
    images, labels = torch.randn(20, 3, 16, 16), torch.arange(20) % 10
    group = find_groups(model, images[:1]).groups[1]
    found = filter_oracle(model, group, images, labels, batch=7)
    with torch.no_grad():
        whole = model(images)
        for number in range(group.n_filters):
            keep = torch.arange(group.n_filters) != number
            logits = prune(model, {group: keep})(images)
            loss = functional.cross_entropy(logits, labels) - functional.cross_entropy(whole, labels)
            accuracy = ((logits.argmax(1) == labels).sum() - (whole.argmax(1) == labels).sum()) / 20
            assert found.loss_change[number].item() == pytest.approx(float(loss), abs=1e-5)
            assert found.accuracy_change[number].item() == pytest.approx(float(accuracy))


def test_spearman_is_scipys():
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(0)
    first = torch.rand(30, generator=generator)
    second = (first + torch.rand(30, generator=generator)).mul(5).round()  # with ties
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert spearman(first, -first) == pytest.approx(-1.0)
    assert spearman(first, torch.ones(30)) is None


def test_rows_by_hand():
    layers = {
        "a": {
            "loss_change": [0.3, -0.2, 0.1],
            "accuracy_change": [-0.1, 0.0, -0.2],
            "scores": {"l1": [3, 2, 1], "agent": [0.1, 0.2, 0.3], "random-0": [1, 2, 3], "random-1": [3, 2, 1]},
        },
        "b": {
            "loss_change": [0.4, 0.5, 0.6],
            "accuracy_change": [0.0, 0.0, 0.0],
            "scores": {"l1": [4, 5, 6], "random-0": [1, 2, 3], "random-1": [3, 2, 1]},
        },
    }
    rows = {(row["method"], row["oracle"]): row for row in correlation_rows(layers)}
    # |loss| of a: 0.3, 0.2, 0.1, ranked as l1 ranks them; of b too, and all of b above all of a
    assert rows["l1", "absolute_loss"] == {
        "method": "l1",
        "oracle": "absolute_loss",
        "layers": {"a": pytest.approx(1.0), "b": pytest.approx(1.0)},
        "mean": pytest.approx(1.0),
        "all": pytest.approx(1.0),
    }
    assert rows["l1", "loss"]["layers"]["a"] == pytest.approx(0.5)  # 0.3, -0.2, 0.1: ranks 3, 1, 2 against 3, 2, 1
    assert rows["l1", "accuracy"]["layers"] == {"a": pytest.approx(-0.5), "b": None}
    assert rows["agent", "absolute_loss"]["layers"] == {"a": pytest.approx(-1.0)}
    assert rows["agent", "absolute_loss"]["all"] is None
    assert rows["random", "absolute_loss"]["layers"] == {"a": pytest.approx(0.0), "b": pytest.approx(0.0)}
    assert ("random-0", "loss") not in rows


def test_command_with_agents(keepdrop, checkpoint, finished, tmp_path):
    """On the base that the agents of `finished` were trained on; everything is found again by a resumed run."""
    command = ["oracle", f"checkpoint={finished}/base/model.safetensors", "layers=[conv2,conv3]", f"agents={finished}"]
    result = keepdrop(*command, "evaluation.statistics_images=100", "run_dir=run")
    assert result.code == 0, result.err
    assert "Spearman correlation with the absolute change of the loss" in result.out
    metrics = json.loads(Path("run/metrics.json").read_text())
    rows = {(row["method"], row["oracle"]): row for row in metrics["correlations"]}
    assert {method for method, _ in rows} == {
        *("l1", "l2", "fpgm", "mean_activation", "apoz", "taylor", "bn_scale", "random", "agent")
    }
    assert rows["taylor", "absolute_loss"]["all"] > rows["random", "absolute_loss"]["all"]
    assert list(rows["agent", "loss"]["layers"]) == ["conv2"]
    lines = list(csv.DictReader(Path("run/filters.csv").read_text().splitlines()))
    assert len(lines) == 16 + 32 and lines[0]["agent"] and not lines[-1]["agent"]
    assert float(lines[3]["loss_change"]) == metrics["layers"]["conv2"]["loss_change"][3]
    assert "| taylor |" in Path("run/report.md").read_text()
    words = Checker(Path("run/report.html").read_text()).words()
    mean = rows["agent", "absolute_loss"]["layers"]["conv2"]
    assert "agent foresees" in words or "taylor foresees" in words
    assert f"Report: {Path('run/report.html')}" in result.out and f"{mean:.2f}".replace("-", "\N{MINUS SIGN}") in words
    before = Path("run/metrics.json").read_bytes()
    for name in ("metrics.json", "layers/conv3.json"):
        (tmp_path / "run" / name).unlink()
    assert keepdrop("oracle", "resume=run", "quiet=true").code == 0
    assert Path("run/metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["criteria=[taylr]"], "criteria has 'taylr', which names none; did you mean 'taylor'?"),
        (["criteria=[]"], "There is nothing to compare the oracle with; give criteria or agents."),
        (["random_seeds=0"], "random_seeds is 0; expected a number from 1 to 1,000,000."),
        (["agents=nowhere"], "'nowhere' is not a folder"),
    ],
)
def test_mistakes(refused, checkpoint, overrides, sentence):
    assert refused("oracle", f"checkpoint={checkpoint}", *overrides).startswith(sentence)


def test_agents_of_other_layers(refused, checkpoint, finished):
    sentence = refused("oracle", f"checkpoint={checkpoint}", f"agents={finished}", "layers=[conv5]")
    assert "were trained for conv1, conv2, but the layers are conv5" in sentence
