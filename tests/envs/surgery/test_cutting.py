"""Masked equals pruned: architectures x groups x random masks; and everything a wrong cut is refused for."""

import copy

import numpy as np
import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.groups.verification import difference, randomised
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn, vgg16_bn
from keepdrop.envs.surgery.cutting import cut_channels, prune
from keepdrop.envs.surgery.filter_group import Cut, FilterGroup
from keepdrop.envs.surgery.masking import masked_inputs
from keepdrop.errors import UserError
from torch import nn
from zoo import IMAGES, ZOO

NETWORKS = {
    **{name: (make, IMAGES) for name, make in ZOO.items()},
    "small_cnn": (small_cnn, (2, 1, 8, 8)),
    "cifar_resnet": (lambda: cifar_resnet(14), (2, 3, 8, 8)),
}


def _keep(n, generator):
    keep = torch.rand(n, generator=generator) < torch.rand(1, generator=generator)
    keep[torch.randint(n, (1,), generator=generator)] = True
    return keep


def _prepared(name, dtype):
    make, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(1)
    model = randomised(make(), generator).to(dtype)
    return model, torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), generator


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_masked_equals_pruned(name, dtype, tolerance):
    model, images, generator = _prepared(name, dtype)
    groups = find_groups(model, images, verify=False).groups
    groups = [group for group in groups if group.n_filters > 1]
    for group in groups:
        for _ in range(3):
            assert difference(model, {group: _keep(group.n_filters, generator)}, images) <= tolerance
    for _ in range(3):
        choices = {group: _keep(group.n_filters, generator) for group in groups}
        assert difference(model, choices, images) <= tolerance


def test_masked_equals_pruned_on_vgg():
    generator = torch.Generator().manual_seed(1)
    model = vgg16_bn().eval()
    images = torch.randn(2, 3, 32, 32)
    groups = find_groups(model, images, verify=False).groups
    for group in groups[::4]:
        assert difference(model, {group: _keep(group.n_filters, generator)}, images) <= 1e-5
    assert difference(model, {group: _keep(group.n_filters, generator) for group in groups}, images) <= 1e-5


def test_a_wrong_cut_does_not_pass():
    model, images, _ = _prepared("small_cnn", torch.float64)
    group = find_groups(model, images).groups[0]
    producer, norm, consumer = group.cuts
    shifted = Cut(norm.module, "out", np.roll(norm.channels, 1, axis=0), "pass")
    wrong = FilterGroup(group.name, group.n_filters, (producer, shifted, consumer))
    keep = torch.arange(group.n_filters) % 3 > 0
    assert difference(model, {group: keep}, images) < 1e-12
    assert difference(model, {wrong: keep}, images) > 1e-3


def test_masks_bite():
    model, images, _generator = _prepared("cifar_resnet", torch.float64)
    plain = model(images)
    for group in find_groups(model, images).groups:
        keep = torch.ones(group.n_filters, dtype=torch.bool)
        with masked_inputs(model, {group: keep}):
            assert torch.allclose(model(images), plain, rtol=1e-12)
        keep[::2] = False
        with masked_inputs(model, {group: keep}):
            assert not torch.allclose(model(images), plain, rtol=1e-3)
    assert torch.equal(model(images), plain)


def test_the_input_network_is_untouched_and_the_result_stands_alone():
    model = small_cnn().train()
    model.conv2.weight.requires_grad_(False)
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    group = find_groups(model, torch.randn(2, 1, 8, 8)).groups[1]
    pruned = prune(model, {group: torch.arange(16) < 5})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert pruned.conv2.weight.shape == (5, 16, 3, 3) and pruned.conv2.out_channels == 5
    assert pruned.bn2.num_features == 5 and pruned.conv3.in_channels == 5
    assert not pruned.conv2.weight.requires_grad and pruned.conv3.weight.requires_grad
    assert pruned.training and not pruned.bn1.training
    mine = {parameter.data_ptr() for parameter in model.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in pruned.parameters()}
    pruned(torch.randn(2, 1, 8, 8)).sum().backward()
    assert pruned.conv3.weight.grad.shape == pruned.conv3.weight.shape


def test_an_optimiser_keeps_its_own_tensors_and_the_cut_network_gets_new_ones():
    model, images = small_cnn(), torch.randn(4, 1, 8, 8)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images).square().mean().backward()
    optimiser.step()
    group = find_groups(model, images).groups[1]
    pruned = prune(model, {group: torch.arange(16) < 5})
    before = copy.deepcopy(pruned.state_dict())
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(each) for part in optimiser.param_groups for each in part["params"]} == own
    assert all(optimiser.state[each]["momentum_buffer"].shape == each.shape for each in model.parameters())
    optimiser.step()  # with the gradients of before: it moves the network it was made for, and no other
    assert all(torch.equal(before[key], value) for key, value in pruned.state_dict().items())
    assert all(parameter.grad is None or parameter.grad.shape == parameter.shape for parameter in pruned.parameters())
    fresh = torch.optim.SGD(pruned.parameters(), lr=0.1, momentum=0.9)
    pruned(images).square().mean().backward()
    fresh.step()
    assert all(fresh.state[each]["momentum_buffer"].shape == each.shape for each in pruned.parameters())


def test_hooks_see_the_network_they_run_in():
    """Hooks of modules go along and see the smaller tensors; those of parameters stay with the removed ones."""
    model, images, seen, gradients = small_cnn(), torch.randn(2, 1, 8, 8), [], []
    handle = model.conv2.register_forward_hook(lambda module, _, out: seen.append((module, out.shape[1])))
    model.conv2.weight.register_hook(lambda gradient: gradients.append(tuple(gradient.shape)))
    group = find_groups(model, images).groups[1]
    pruned = prune(model, {group: torch.arange(16) < 5})
    seen.clear()
    pruned(images).sum().backward()
    assert seen == [(pruned.conv2, 5)] and gradients == []
    model(images).sum().backward()
    assert seen[1:] == [(model.conv2, 16)] and gradients == [(16, 16, 3, 3)]
    handle.remove()
    model(images)
    assert len(seen) == 2


def test_pruning_again_after_planning_again():
    model, images, _generator = _prepared("cifar_resnet", torch.float64)
    for _ in range(2):
        group = find_groups(model, images).groups[2]
        keep = torch.arange(group.n_filters) % 2 == 0
        with masked_inputs(model, {group: keep}):
            expected = model(images)
        model = prune(model, {group: keep})
        assert torch.allclose(model(images), expected, rtol=1e-10)
    assert model.layer1[1].conv1.out_channels == 4


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.zeros(16, dtype=torch.bool), "keeps none of its 16 filters; keep at least one"),
        (torch.ones(15, dtype=torch.bool), r"must be a bool tensor \(16,\), got torch.bool \(15,\)"),
        (torch.ones(16), r"must be a bool tensor \(16,\), got torch.float32 \(16,\)"),
        ([True] * 16, r"must be a bool tensor \(16,\), got list"),
    ],
)
def test_bad_masks_are_refused(keep, message):
    model = small_cnn()
    group = find_groups(model, torch.randn(1, 1, 8, 8), verify=False).groups[0]
    with pytest.raises(UserError, match=message):
        prune(model, {group: keep})


def test_a_stale_group_is_refused():
    model = small_cnn()
    group = find_groups(model, torch.randn(1, 1, 8, 8), verify=False).groups[0]
    keep = torch.arange(16) < 4
    pruned = prune(model, {group: keep})
    with pytest.raises(UserError, match="find the groups of this network again"):
        prune(pruned, {group: keep})
    with pytest.raises(UserError, match="no module 'conv1'; was it built by another constructor"):
        prune(nn.Sequential(nn.Conv2d(1, 4, 1)), {group: keep})
    twin = FilterGroup(group.name, group.n_filters, group.cuts)
    with pytest.raises(UserError, match="Two of the chosen groups claim the same 'out' channels of 'conv1'"):
        prune(model, {group: keep, twin: keep})


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"conv1": {"out": [0, 16]}}, "must lie between 0 and 15, got 0 to 16"),
        ({"conv1": {"out": [-1, 2]}}, "must lie between 0 and 15, got -1 to 2"),
        ({"conv1": {"out": [3, 3]}}, "must be distinct and ascending"),
        ({"conv1": {"out": [3, 1]}}, "must be distinct and ascending"),
        ({"conv1": {"out": []}}, "No 'out' channel of 'conv1' would be left"),
        ({"conv1": {"out": [0.5]}}, "must be a flat list of whole numbers"),
        ({"conv1": {"out": [[1]]}}, "must be a flat list of whole numbers"),
        ({"conv1": {"out": [[1], 2]}}, "must be a flat list of whole numbers"),
        ({"conv1": {"up": [1]}}, "has no axis 'up' to cut"),
        ({"bn1": {"in": [1]}}, r"\(BatchNorm2d\) has no axis 'in' to cut"),
        ({"relu1": {"out": [1]}}, "A ReLU has no 'out' channels that can be cut"),
        ({"bn1": {"nothing:0": [1]}}, "A BatchNorm2d holds no tensor for 'nothing:0' that can be cut"),
        ({"bn1": {"training:0": [1]}}, "holds no tensor for 'training:0'"),
        ({"bn1": {"weight:1": [1]}}, "holds no tensor for 'weight:1'"),
        ({"bn1": {"weight:-1": [1]}}, "holds no tensor for 'weight:-1'"),
        ({"": {"conv1.weight:0": [1]}}, "holds no tensor for 'conv1.weight:0'"),
        ({"bn1": {"weight:0": [16]}}, "must lie between 0 and 15"),
    ],
)
def test_bad_indices_are_refused(kept, message):
    with pytest.raises(UserError, match=message):
        cut_channels(small_cnn(), kept)


@pytest.mark.parametrize(
    ("module", "kept", "message"),
    [
        (nn.Conv2d(8, 8, 1, groups=2), {"out": [0, 1, 2, 4]}, "must lose equally many channels"),
        (nn.Conv2d(8, 8, 1, groups=2), {"out": [0, 1]}, "would lose all of one side only"),
        (nn.Conv2d(4, 8, 1, groups=4), {"out": [0, 1, 2]}, "2 filters of one channel of the depthwise '0'"),
        (nn.GroupNorm(2, 8), {"out": [0, 1, 2, 3, 4]}, "4 channels of one group of the GroupNorm '0'"),
        (nn.LayerNorm(8), {"out": [0]}, "A LayerNorm has no 'out' channels"),
        (nn.LSTM(4, 8), {"out": [0]}, "has no axis 'out' to cut"),
    ],
)
def test_cuts_a_module_cannot_bear_are_refused(module, kept, message):
    with pytest.raises(UserError, match=message):
        cut_channels(nn.Sequential(module), {"0": kept})


def test_whole_blocks_of_a_grouped_convolution_can_go():
    module = nn.Conv2d(8, 12, 3, groups=4)
    images = torch.randn(2, 8, 5, 5)
    kept = {"0": {"out": [0, 1, 2, 9, 10, 11], "in": [0, 1, 6, 7]}}
    pruned = cut_channels(nn.Sequential(module), kept)
    assert pruned[0].groups == 2
    expected = module(images)[:, kept["0"]["out"]]
    assert torch.allclose(pruned(images[:, kept["0"]["in"]]), expected, atol=1e-6)
