"""The `reconstruction` criterion as a control of layer agents: filters given up one by one, at given counts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from digits_task import QUICK, make_task
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction_error import ERROR_IMAGES, error_curves
from keepdrop.envs.task import replace_model
from keepdrop.errors import UserError
from keepdrop.experiments.config.prepare import check_controls
from keepdrop.experiments.pruning.decide import CONTROLS, AskCriterion
from keepdrop.experiments.pruning.network_decide import AskNetworkCriterion
from torch import nn

COUNTS = {"conv1": 8, "conv2": 4, "conv3": 5}


def asked(criterion, layer, seed=0):
    return AskCriterion(criterion, COUNTS)(layer, Path(), seed)


def test_reconstruction_keeps_what_its_readers_cannot_do_without():
    task = make_task(QUICK)
    first, keep = task.layer("conv1"), torch.arange(8) != 2
    later = replace_model(task, first.cut(keep), task.kept.after(task.model, {first.group: keep}))
    layer = later.layer("conv2")
    decision = asked("reconstruction", layer)
    curves = error_curves(later.model, [layer.group], *later.fit_images(ERROR_IMAGES))
    order = curves["conv2"].order.tolist()
    assert decision.source == "reconstruction"
    assert decision.keep.nonzero().flatten().tolist() == sorted(order[-4:])
    assert bool(asked("reconstruction", first).keep.all())


def test_reconstruction_loses_less_than_chance_or_norms_at_the_same_counts():
    task = make_task(QUICK)
    lost = {}
    for name in ("reconstruction", "l1", "random"):
        masks = [asked(name, task.layer(layer), seed=1).keep for layer in ("conv2", "conv3")]
        assert [int(mask.sum()) for mask in masks] == [4, 5]
        outcomes = [task.layer(f"conv{i}").outcomes(mask[None])[0] for i, mask in enumerate(masks, start=2)]
        lost[name] = sum(outcome.accuracy_drop for outcome in outcomes)
    assert lost["reconstruction"] < min(lost["l1"], lost["random"])


def test_a_network_agents_controls_can_be_it_too():
    one_shot = OneShotTask(make_task(QUICK), None)
    decision = AskNetworkCriterion("reconstruction", COUNTS)(one_shot, Path(), Path(), 0)
    assert {name: int(mask.sum()) for name, mask in decision.masks.items()} == COUNTS


def test_controls_are_checked_before_the_search():
    torch.manual_seed(0)
    grouped = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(128, 10))
    task = make_task()
    inputs = SimpleNamespace(dense=task.model, groups=task.groups)
    check_controls(CONTROLS, inputs)
    with pytest.raises(UserError, match=r"controls has 'l7'; expected any of l1, .*, random, reconstruction\."):
        check_controls(["l7"], inputs)
    groups = [group for group in find_groups(grouped, task.example).groups if group.name == "0"]
    unreadable = SimpleNamespace(dense=None, construct=lambda: grouped, groups=groups)
    check_controls(["l1"], unreadable)
    with pytest.raises(
        UserError, match="'reconstruction' cannot judge '0': '1', which reads its filters, is a grouped"
    ):
        check_controls(["l1", "reconstruction"], unreadable)
