"""Meters: counted like the surgery, to the last parameter and byte."""

import copy

import pytest
import torch
from keepdrop.envs.files.pruned_network import WEIGHTS, save_pruned
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.kept_channels import KeptChannels
from keepdrop.envs.surgery.meters import MacsMeter, WeightsMeter
from torch import nn

CASES = {"chain": (small_cnn(), (1, 1, 8, 8)), "residual": (cifar_resnet(8), (1, 3, 16, 16))}


def planned(case):
    model, shape = CASES[case]
    example = torch.zeros(shape)
    groups = find_groups(model.eval(), example).groups
    return model, example, groups, count_cost(model, example)


def cut(model, groups):
    kept = [max(1, group.n_filters * (3 + i) // 10) for i, group in enumerate(groups)]
    choices = {group: torch.arange(group.n_filters) < n for group, n in zip(groups, kept, strict=True)}
    return kept, prune(model, choices), KeptChannels().after(model, choices)


@pytest.mark.parametrize("case", CASES)
def test_macs_are_those_of_the_cut_network(case):
    model, example, groups, cost = planned(case)
    kept, smaller, _ = cut(model, groups)
    after = count_cost(smaller, example)
    whole, own = (MacsMeter(model, cost, groups, of) for of in ("network", "groups"))
    assert whole.cost(kept) == pytest.approx(after.macs) and whole.whole == cost.macs
    producers = {cut.module for group in groups for cut in group.producers}
    assert own.cost(kept) == pytest.approx(sum(after.modules[name].macs for name in producers))
    assert own.whole == sum(cost.modules[name].macs for name in producers)


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_bytes_are_those_of_the_saved_network(case, tmp_path):
    model, example, groups, cost = planned(case)
    kept, smaller, channels = cut(model, groups)
    params, size = WeightsMeter(model, groups), WeightsMeter(model, groups, "bytes")
    assert params.whole == cost.params
    assert params.cost(kept) == pytest.approx(count_cost(smaller, example).params)
    save_pruned(smaller, tmp_path, kept=channels)
    written = (tmp_path / WEIGHTS).stat().st_size
    assert written <= size.cost(kept) + 1e-6 < 1.01 * written + 200


def test_a_depthwise_network_and_a_shared_layer_count_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 12, 1)
            self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
            self.twice = nn.Conv2d(12, 12, 1)
            self.alias = self.twice
            self.head = nn.Linear(12, 4)

        def forward(self, x):
            x = self.depth(self.first(x)).relu()
            return self.head(self.alias(self.twice(x)).mean((2, 3)))

    torch.manual_seed(0)
    model, example = Shared().eval(), torch.zeros(1, 3, 6, 6)
    groups = find_groups(model, example).groups
    meter = WeightsMeter(model, groups)
    assert groups and meter.whole == sum(parameter.numel() for parameter in model.parameters())
    kept, smaller, _ = cut(copy.deepcopy(model), groups)
    assert meter.cost(kept) == pytest.approx(sum(parameter.numel() for parameter in smaller.parameters()))
