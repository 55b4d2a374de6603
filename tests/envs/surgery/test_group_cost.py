"""Costs by arithmetic equal the counted costs of networks that were really cut."""

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn, vgg16_bn
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.group_cost import pruned_cost
from zoo import IMAGES, ZOO

NETWORKS = {
    **{name: (make, IMAGES) for name, make in ZOO.items()},
    "small_cnn": (small_cnn, (1, 1, 8, 8)),
    "cifar_resnet": (lambda: cifar_resnet(8), (1, 3, 8, 8)),
}


def _keep(group, generator):
    keep = torch.rand(group.n_filters, generator=generator) < torch.rand(1, generator=generator)
    keep[torch.randint(group.n_filters, (1,), generator=generator)] = True
    return keep


def _compare(model, images, choices):
    cost = pruned_cost(model, count_cost(model, images), {group: int(keep.sum()) for group, keep in choices.items()})
    really = count_cost(prune(model, choices), images)
    assert cost == (really.macs, really.params)


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_cost_of_the_pruned_network(name):
    make, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(3)
    model, images = make(), torch.randn(shape, generator=generator)
    groups = find_groups(model, images, verify=False).groups
    assert groups
    for group in groups:
        for _ in range(3):
            _compare(model, images, {group: _keep(group, generator)})
    for _ in range(3):
        _compare(model, images, {group: _keep(group, generator) for group in groups})


def test_equals_the_cost_of_the_pruned_vgg():
    generator = torch.Generator().manual_seed(3)
    model, images = vgg16_bn(), torch.randn(1, 3, 32, 32)
    groups = find_groups(model, images, verify=False).groups
    _compare(model, images, {group: _keep(group, generator) for group in groups})


def test_by_hand():
    model, images = small_cnn(widths=(4, 6)), torch.randn(1, 1, 8, 8)
    group = find_groups(model, images).groups[0]
    cost = count_cost(model, images)
    # One filter of conv1: 9 weights at 64 positions, 2 of bn1, and 9 weights in each of conv2's 6 filters.
    assert pruned_cost(model, cost, {group: 3}) == (cost.macs - 64 * (9 + 54), cost.params - (9 + 2 + 54))
    assert pruned_cost(model, cost, {}) == pruned_cost(model, cost, {group: 4}) == (cost.macs, cost.params)
    assert pruned_cost(model, cost, {group: 0}) == (cost.macs - 4 * 64 * 63, cost.params - 4 * 65)


def test_more_filters_than_there_are():
    model, images = small_cnn(), torch.randn(1, 1, 8, 8)
    group = find_groups(model, images).groups[0]
    with pytest.raises(ValueError, match=r"group 'conv1' cannot keep 17 of its 16 filters"):
        pruned_cost(model, count_cost(model, images), {group: 17})
