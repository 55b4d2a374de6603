"""The twelve statistics: by hand on a tiny network, by finite differences and recorded activations on the zoo."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.groups.verification import randomised
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.observation import STATISTIC_NAMES, filter_weights, observe, observe_all
from keepdrop.envs.surgery.masking import batch_dim, channel_dim, masked_inputs
from keepdrop.errors import UserError
from torch import nn
from torch.nn import functional as F
from zoo import IMAGES, ZOO, Decoder, Flattened, Grouped

FILTERS = torch.tensor([[3.0, -4.0], [1.0, 1.0]])
READ = torch.tensor([[1.0, 0.5], [-2.0, 0.5], [0.0, -1.0]])
# What the layer behind conv-BN-ReLU reads of the two filters in two images of two positions.
ACTIVATION = np.array([[[0.0, 9.0], [0.5, 0.5]], [[3.0, 0.0], [1.0, 0.5]]])


class Tiny(nn.Module):
    """Two filters on two positions; logits are the mean over positions of a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0), nn.Conv2d(2, 3, 1)
        with torch.no_grad():
            self.conv.weight.copy_(FILTERS[:, :, None, None])
            self.bn.weight.copy_(torch.tensor([-2.0, 0.5]))
            self.bn.bias.copy_(torch.tensor([1.0, 0.0]))
            self.head.weight.copy_(READ[:, :, None, None])
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(F.relu(self.bn(self.conv(x)))).mean((2, 3))


@pytest.fixture(scope="module")
def tiny():
    model = Tiny()
    images = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]], [[[1.0, 1.0]], [[1.0, 0.0]]]])
    (group,) = find_groups(model, images).groups
    shown = observe(model, group, images, torch.tensor([1, 2]))
    return shown.weights, dict(zip(STATISTIC_NAMES, shown.statistics.T, strict=True))


BY_HAND = {
    "l1": [3.5, 1.0],
    "l2": [12.5**0.5, 1.0],
    "weight_mean": [-0.5, 1.0],
    "weight_std": [3.5, 0.0],
    "bn_scale": [2.0, 0.5],
    "bn_shift": [1.0, 0.0],
    "mean_activation": [3.0, 0.625],
    "apoz": [0.5, 0.0],
    "consumer_l1": [1.0, 2 / 3],
    "consumer_l2": [(5 / 3) ** 0.5, 0.5**0.5],
    # Two filters: the squared cosine of their activations.
    "redundancy": [7.5**2 / (90 * 1.75)] * 2,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(tiny, name):
    assert tiny[1][name] == pytest.approx(BY_HAND[name], abs=3e-5)


def test_weights_and_form(tiny):
    weights, statistics = tiny
    assert np.array_equal(weights, FILTERS.numpy())
    assert weights.dtype == np.float32 and all(column.dtype == np.float32 for column in statistics.values())
    assert len(STATISTIC_NAMES) == 12 and set(STATISTIC_NAMES) == {*BY_HAND, "taylor"}


def test_taylor_by_hand(tiny):
    logits = ACTIVATION.mean(2) @ READ.numpy().T
    error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[[1, 2]]
    gradient = (error @ READ.numpy() / 2)[:, :, None]  # the same at both positions
    assert tiny[1]["taylor"] == pytest.approx(np.abs((ACTIVATION * gradient).mean(2)).mean(0), rel=1e-5)


def _prepared(name, count=5):
    generator = torch.Generator().manual_seed(5)
    model = randomised(ZOO[name](), generator)
    images = torch.randn(count, *IMAGES[1:], generator=generator, dtype=torch.float64)
    groups = find_groups(model, images[:1], verify=False).groups
    return model, images, torch.arange(count) % 4, [group for group in groups if group.n_filters > 1]


def _column(shown, name):
    return torch.from_numpy(shown.statistics[:, STATISTIC_NAMES.index(name)]).double()


def _samples(model, group, images):
    """Everything that consumers read of each filter, (B, N, S)."""
    seen = []

    def reader(cut):
        def hook(module, inputs):
            dims = batch_dim(module, inputs[0]), channel_dim(module, inputs[0])
            value = inputs[0].movedim(dims, (0, 1))
            seen.append(torch.stack([value[:, rows].flatten(1) for rows in cut.channels.tolist()], dim=1))

        return hook

    handles = [model.get_submodule(c.module).register_forward_pre_hook(reader(c)) for c in group.consumers]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return torch.cat(seen, dim=2)


@pytest.mark.parametrize("name", ZOO)
def test_activations_as_recorded(name):
    model, images, labels, groups = _prepared(name)
    for group in groups:
        shown, samples = observe(model, group, images, labels), _samples(model, group, images)
        assert torch.allclose(_column(shown, "mean_activation"), samples.mean((0, 2)), rtol=1e-5, atol=1e-7)
        assert torch.allclose(_column(shown, "apoz"), (samples <= 0).double().mean((0, 2)), rtol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_all_groups_by_the_same_passes_as_each_alone(name):
    model, images, labels, groups = _prepared(name)
    for group, shown in zip(groups, observe_all(model, groups, images, labels, batch=3), strict=True):
        alone = observe(model, group, images, labels, batch=3)
        assert np.array_equal(shown.statistics, alone.statistics) and np.array_equal(shown.weights, alone.weights)


@pytest.mark.parametrize("name", ZOO)
def test_taylor_is_the_finite_difference(name):
    """Turning a filter up and down a little wherever it is read changes each image's loss as the statistic says."""
    model, images, labels, groups = _prepared(name, count=2)
    group = groups[-1] if name != "Reused" else groups[0]
    expected = []
    for i in range(min(group.n_filters, 4)):
        losses = []
        for step in (1e-5, -1e-5):
            gain = torch.eye(group.n_filters, dtype=torch.float64)
            gain[i, i] += step
            mixes = {(group.name, cut.module): gain for cut in group.consumers}
            keep = torch.ones(group.n_filters, dtype=torch.bool)
            with masked_inputs(model, {group: keep}, mixes), torch.no_grad():
                losses.append(F.cross_entropy(model(images), labels, reduction="none"))
        expected.append(((losses[0] - losses[1]) / 2e-5).abs().mean() / _samples(model, group, images).shape[2])
    taylor = _column(observe(model, group, images, labels), "taylor")[: len(expected)]
    assert taylor.max() > 0
    assert torch.allclose(taylor, torch.stack(expected), rtol=1e-4, atol=1e-9)


def test_redundancy_is_the_share_that_a_regression_explains():
    model, images, labels, groups = _prepared("ResidualStream", count=20)
    group = groups[1]
    samples = _samples(model, group, images).transpose(0, 1).flatten(1)
    for i in range(group.n_filters):
        others = samples[torch.arange(group.n_filters) != i].T
        rest = samples[i] - others @ torch.linalg.lstsq(others, samples[i]).solution
        explained = 1 - rest.square().sum() / samples[i].square().sum()
        assert float(_column(observe(model, group, images, labels), "redundancy")[i]) == pytest.approx(
            float(explained), abs=1e-3
        )


def test_a_copied_filter_is_redundant_and_a_dead_one_does_no_harm():
    model = small_cnn().eval()
    with torch.no_grad():
        model.conv2.weight[3] = 2 * model.conv2.weight[7]
        model.bn2.weight[5], model.bn2.bias[5] = 0.0, -1.0
    images = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    group = find_groups(model, images[:1]).groups[1]
    shown = observe(model, group, images, torch.arange(40) % 10)
    redundancy = _column(shown, "redundancy")
    assert redundancy[3] > 0.999 and redundancy[7] > 0.999
    assert redundancy[0] < 0.99
    assert _column(shown, "apoz")[5] == 1 and _column(shown, "taylor")[5] == 0


def test_without_batch_norm_the_scale_is_1_and_the_shift_0():
    model, images, labels, groups = _prepared("ResidualStream")
    group = next(group for group in groups if group.name == "inner1")
    shown = observe(model, group, images, labels)
    assert (_column(shown, "bn_scale") == 1).all() and (_column(shown, "bn_shift") == 0).all()


def test_grouped_convolutions():
    """A grouped consumer is read in each filter's own block, R filters of a grouped producer as one row."""
    model, images, labels, groups = _prepared("Grouped")
    assert isinstance(model, Grouped)
    reduce, grouped = groups[:2]
    shown = observe(model, reduce, images, labels)
    cut = reduce.consumers[0]
    weight = model.grouped.weight.detach()  # (16, 3, 3, 3): 4 blocks of 4 outputs that read 3 inputs
    for row, channels in zip(shown.statistics, cut.channels.tolist(), strict=True):
        read = torch.cat([weight[4 * (c // 3) : 4 * (c // 3) + 4, c % 3].flatten() for c in channels])
        assert row[STATISTIC_NAMES.index("consumer_l1")] == pytest.approx(float(read.abs().mean()), rel=1e-5)
    rows = filter_weights(model, grouped)
    channels = grouped.producers[0].channels.tolist()
    assert torch.equal(rows, torch.stack([weight[c].flatten() for c in channels]).float())


def test_transposed_convolutions():
    model, images, labels, groups = _prepared("Decoder")
    assert isinstance(model, Decoder)
    by_name = {group.name: group for group in groups}
    up, grouped = by_name["up"], by_name["grouped"]
    channels = up.producers[0].channels.tolist()
    expected = torch.stack([torch.cat([model.up.weight[:, c].flatten() for c in each]) for each in channels])
    assert torch.equal(filter_weights(model, up), expected.float())
    # (in 8, out / groups 6): output c is column c % 6 of the inputs of block c // 6.
    rows = filter_weights(model, grouped)
    for row, channels in zip(rows, grouped.producers[0].channels.tolist(), strict=True):
        own = [model.grouped.weight[4 * (c // 6) : 4 * (c // 6) + 4, c % 6].flatten() for c in channels]
        assert torch.equal(row, torch.cat(own).float())
    # A transposed consumer keeps the input channel first.
    read = model.grouped.weight.detach()[torch.from_numpy(up.consumers[0].channels)].flatten(1)
    assert torch.allclose(_column(observe(model, up, images, labels), "consumer_l1"), read.abs().mean(1), rtol=1e-5)


def test_a_group_need_not_be_called_like_its_convolution():
    """Where two groups share a root, the second one's name has an index behind it."""
    model, images, labels, groups = _prepared("Concat")
    renamed = dataclasses.replace(groups[0], name=f"{groups[0].name}[2]")
    one, other = (observe(model, group, images, labels) for group in (groups[0], renamed))
    assert np.array_equal(one.weights, other.weights) and np.array_equal(one.statistics, other.statistics)


def test_a_linear_layer_behind_a_flatten():
    model, images, labels, groups = _prepared("Flattened")
    assert isinstance(model, Flattened)
    shown = observe(model, groups[0], images, labels)
    columns = model.hidden.weight.detach().reshape(10, 6, 16)  # 16 positions of each of 6 filters
    assert torch.allclose(_column(shown, "consumer_l1"), columns.abs().mean((0, 2)), rtol=1e-5)
    pooled = F.max_pool2d(F.relu(model.bn(model.conv(images))), 2).detach()
    assert torch.allclose(_column(shown, "mean_activation"), pooled.mean((0, 2, 3)), rtol=1e-5)


def test_every_group_of_the_zoo_has_finite_statistics():
    for name in ZOO:
        model, images, labels, groups = _prepared(name)
        for group in groups:
            shown = observe(model.float(), group, images.float(), labels)
            assert shown.weights.shape[0] == group.n_filters and shown.statistics.shape == (group.n_filters, 12)
            assert np.isfinite(shown.statistics).all() and np.isfinite(shown.weights).all()
            assert np.abs(shown.weights).mean(1) == pytest.approx(shown.statistics[:, 0], rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 13])
def test_the_batch_size_does_not_matter(batch):
    model, images, labels, groups = _prepared("ResidualStream", count=13)
    for group in groups:
        one = observe(model, group, images, labels).statistics
        assert observe(model, group, images, labels, batch=batch).statistics == pytest.approx(one, rel=1e-5, abs=1e-7)


def test_the_network_is_left_as_it_was():
    model = small_cnn().train()
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    images = torch.randn(6, 1, 8, 8)
    group = find_groups(model, images[:1]).groups[0]
    observe(model, group, images, torch.arange(6))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not model.conv1.weight.requires_grad and model.conv2.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_works_for_frozen_networks_and_without_gradients():
    model = small_cnn()
    images = torch.randn(6, 1, 8, 8)
    group = find_groups(model, images[:1]).groups[0]
    expected = observe(model, group, images, torch.arange(6)).statistics
    with torch.no_grad():
        assert np.array_equal(observe(model.requires_grad_(False), group, images, torch.arange(6)).statistics, expected)


def test_values_that_are_not_finite_are_refused():
    model = small_cnn()
    images = torch.randn(6, 1, 8, 8)
    group = find_groups(model, images[:1]).groups[0]
    images[2, 0, 1, 1] = torch.nan
    with pytest.raises(UserError, match=r"The statistic 'mean_activation' of 'conv1' is not finite; check"):
        observe(model, group, images, torch.arange(6))
