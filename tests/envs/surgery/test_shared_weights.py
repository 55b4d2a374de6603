"""Weights that several layers share stay shared through cut, repair, file and evaluation, and count once."""

import copy

import pytest
import torch
from keepdrop.envs.evaluation.mask_evaluator import MaskEvaluator
from keepdrop.envs.evaluation.masked_network import MaskedNetwork
from keepdrop.envs.files.pruned_network import load_pruned, save_pruned
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.repair.compensation import Compensation
from keepdrop.envs.repair.reconstruction import Reconstruction
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.kept_channels import KeptChannels
from keepdrop.envs.surgery.masking import masked_inputs
from keepdrop.envs.surgery.shared_weights import shared_parameters
from torch import nn
from zoo import ZOO

TIED = [[("first", "weight"), ("second", "weight")], [("down", "weight"), ("up", "weight")]]


@pytest.fixture
def tied():
    generator = torch.Generator().manual_seed(2)
    model, images = ZOO["Tied"]().eval(), torch.randn(6, 3, 8, 8, generator=generator)
    plan = find_groups(model, images[:1])
    return model, images, plan, {group: torch.arange(group.n_filters) % 3 > 0 for group in plan.groups}


def test_shared_weights_are_found():
    assert shared_parameters(ZOO["Tied"]()) == TIED
    assert shared_parameters(ZOO["Reused"]()) == []
    model = nn.ModuleDict({"one": nn.Conv2d(3, 4, 1)})
    model["other"] = model["one"]
    assert shared_parameters(model) == [], "one module under two names is one module"


def test_a_cut_leaves_them_shared_and_the_network_as_small_as_it_is_counted(tied):
    model, images, _, choices = tied
    smaller = prune(prune(model, choices), {})
    assert shared_parameters(smaller) == TIED and smaller.second.weight is smaller.first.weight
    assert smaller.first.weight.shape == (5, 5, 3, 3) and smaller.up.weight.shape == (4, 5, 2, 2)
    assert smaller.first.bias is not smaller.second.bias
    cost = count_cost(smaller, images[:1])
    assert cost.params == len(torch.cat([each.flatten() for each in set(smaller.parameters())]))
    assert sum(module.params for module in cost.modules.values()) == cost.params
    assert cost.modules["first"].macs == cost.modules["second"].macs == 5 * 5 * 9 * 64


@pytest.mark.parametrize("method", ["split", "whole"])
def test_masks_are_those_of_the_plain_masked_network(tied, method):
    model, images, plan, choices = tied
    network = MaskedNetwork(model, plan.groups, images[:3], method=method)
    for group, keep in choices.items():
        with network.masked({group.name: keep[None]}, 0) as run, masked_inputs(model, {group: keep}):
            assert torch.allclose(run(network.prefix(images)), model(images), atol=1e-5)
        with network.masked({group.name: torch.ones_like(keep)[None]}, 0) as run:
            assert torch.allclose(run(network.prefix(images)), model(images), atol=1e-5)


def test_compensation_leaves_them_alone_and_is_what_was_evaluated(tied):
    model, images, plan, choices = tied
    labels = torch.arange(6) % 4
    for group in plan.groups:
        compensation = Compensation.fit(model, group, images)
        assert set(compensation.skipped) == {cut.module for cut in group.consumers} & {"first", "second", "down", "up"}
        evaluator = MaskEvaluator(model, [group], images, labels)
        mask = choices[group][None]
        judged = evaluator.correct({group.name: mask}, mixes=compensation.matrices(mask))
        smaller = prune(model, {group: choices[group]})
        compensation.fold(smaller, group, choices[group])
        assert shared_parameters(smaller) == TIED
        assert int(judged) == int((smaller(images).argmax(1) == labels).sum())


def test_regression_leaves_them_alone(tied):
    model, images, _, choices = tied
    repair = Reconstruction(model, images)
    assert {name for name, why in repair.skipped.items() if "shares its weight" in why} == {
        "first", "second", "down", "up"
    }  # fmt: skip
    assert shared_parameters(repair.cut(choices)) == TIED


def test_file_and_training_keep_them_shared(tied, tmp_path):
    model, images, _, choices = tied
    smaller = prune(model, choices)
    optimiser = torch.optim.SGD(smaller.parameters(), 0.1)
    smaller(images).square().mean().backward()
    optimiser.step()
    save_pruned(smaller, tmp_path, kept=KeptChannels().after(model, choices), input_shape=(1, 3, 8, 8))
    loaded = load_pruned(tmp_path, ZOO["Tied"])
    assert shared_parameters(loaded) == TIED and torch.equal(loaded(images), smaller.eval()(images))
    assert shared_parameters(copy.deepcopy(loaded)) == TIED


def _sharing(change):
    model = ZOO["ResidualStream"]()
    change(model)
    plan = find_groups(model, torch.randn(1, 3, 8, 8))
    return plan, {item.name: item.reason for item in plan.skipped}


def test_a_weight_that_the_network_holds_as_well_loses_the_same_filters_and_keeps_its_inputs():
    model = ZOO["ResidualStream"]()
    model.alias = model.inner1.weight
    plan = find_groups(model, torch.randn(1, 3, 8, 8))
    assert plan.names == ("inner1", "inner2", "outer2")
    (skipped,) = (item for item in plan.skipped if item.name == "stem")
    assert "share their weight, and not all of it can be cut in both" in skipped.reason
    smaller = prune(model, {plan.groups[0]: torch.arange(6) < 4})
    assert smaller.alias is smaller.inner1.weight and smaller.alias.shape == (4, 8, 3, 3)


def test_a_layer_that_does_not_run_keeps_the_weight_that_it_shares():
    def change(model):
        model.unused = nn.Conv2d(8, 6, 3)
        model.unused.weight = model.inner1.weight

    plan, reasons = _sharing(change)
    assert "inner1" not in plan.names and "'unused' and 'inner1' share their weight" in reasons["inner1"]


def test_a_shared_normalisation_ties_its_layers():
    def change(model):
        model.inner1, model.inner2 = (
            nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, stride=s), nn.BatchNorm2d(6)) for s in (1, 2)
        )
        model.inner2[1].weight = model.inner1[1].weight

    plan, _ = _sharing(change)
    (group,) = (group for group in plan.groups if group.name == "inner1.0")
    assert [cut.module for cut in group.producers] == ["inner1.0", "inner2.0"]
