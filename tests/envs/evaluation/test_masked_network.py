"""The partitioned network gives what the masked network gives, whatever the shape of its graph."""

import copy

import pytest
import torch
from answered import logits_of
from keepdrop.envs.evaluation.masked_network import MaskedNetwork
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.groups.verification import randomised
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.surgery.folding import by_input, fold, from_input
from keepdrop.envs.surgery.masking import masked_inputs
from keepdrop.errors import UserError
from torch import nn
from zoo import IMAGES, ZOO

WHOLE = {"Branching"}


def _masks(group, generator, m=3):
    masks = torch.rand(m, group.n_filters, generator=generator) < 0.6
    masks[:, 0] = True
    return masks


def _expected(model, images, choices, mixes=None):
    rows = []
    for index in range(3):
        now = {group: mask[index] for group, mask in choices.items()}
        with torch.no_grad(), masked_inputs(model, now, {k: v[index] for k, v in (mixes or {}).items()}):
            rows.append(model(images))
    return torch.stack(rows)


def _prepared(make, shape=IMAGES):
    generator = torch.Generator().manual_seed(3)
    model = randomised(make(), generator).float()
    images = torch.randn(5, *shape[1:], generator=generator)
    groups = [g for g in find_groups(model, images, verify=False).groups if g.n_filters > 1]
    return model, images, groups, generator


def _same(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("name", ZOO)
def test_suffix_under_a_mask_is_the_masked_network(name):
    model, images, groups, generator = _prepared(ZOO[name])
    for group in groups:
        masks = _masks(group, generator)
        network = MaskedNetwork(model, [group], images[:3])
        assert network.method == ("whole" if name in WHOLE else "split"), network.why_whole
        assert _same(
            logits_of(network, network.prefix(images), {group.name: masks}), _expected(model, images, {group: masks})
        )


@pytest.mark.parametrize("name", ["ResidualStream", "Concat", "Grouped", "Flattened", "Decoder", "Branching"])
def test_several_groups_and_mixes_at_once(name):
    model, images, groups, generator = _prepared(ZOO[name])
    choices = {group: _masks(group, generator) for group in groups}
    mixes = {
        (group.name, cut.module): torch.randn(3, group.n_filters, group.n_filters, generator=generator)
        for group in groups[::2]
        for cut in group.consumers
    }
    network = MaskedNetwork(model, groups, images[:3])
    masks = {group.name: mask for group, mask in choices.items()}
    got = logits_of(network, network.prefix(images), masks, mixes)
    assert _same(got, _expected(model, images, choices, mixes))
    # A group that is not named keeps everything, and nothing of the masks before stays behind.
    only = {groups[0]: choices[groups[0]]}
    got = logits_of(network, network.prefix(images), {groups[0].name: choices[groups[0]]})
    assert _same(got, _expected(model, images, only))


def test_split_and_whole_agree_and_late_groups_have_small_suffixes():
    model, images, groups, generator = _prepared(lambda: cifar_resnet(8), (1, 3, 16, 16))
    masks = _masks(groups[-1], generator)
    fast = MaskedNetwork(model, groups[-1:], images[:3])
    slow = MaskedNetwork(model, groups[-1:], images[:3], method="whole")
    assert (fast.method, slow.method, slow.why_whole) == ("split", "whole", "it was asked for")
    names = {groups[-1].name: masks}
    assert _same(logits_of(fast, fast.prefix(images), names), logits_of(slow, slow.prefix(images), names))
    calls = [n for n in fast._partition.suffix.graph.nodes if n.op == "call_module"]
    assert [n.target for n in calls if "conv" in n.target] == ["fused_layer3_0_conv2"]


def test_the_users_model_is_untouched():
    model = small_cnn().train()
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(4, 1, 8, 8)
    group = find_groups(model, images, verify=False).groups[0]
    network = MaskedNetwork(model, [group], images)
    logits_of(network, network.prefix(images), {"conv1": torch.arange(16)[None] < 4})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and all(p.requires_grad for p in model.parameters())


class _InPlace(nn.Module):
    """Everything in place, and a value that is read before and after it is overwritten."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.side = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.relu, self.linear = nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.inner(x.sigmoid_())
        self.relu(y)
        z = self.side(y)
        z += x
        z.mul_(0.5)
        x = torch.nn.functional.relu(z, inplace=True) + y
        return self.linear(x.mean((2, 3)))


def test_in_place_operations_do_not_spoil_the_frontier():
    model, images, groups, generator = _prepared(_InPlace)
    for group in groups:
        masks = _masks(group, generator)
        network = MaskedNetwork(model, [group], images[:3])
        assert network.method == "split", network.why_whole
        frontier = network.prefix(images)
        before = [value.clone() for value in frontier]
        first = logits_of(network, frontier, {group.name: masks})
        assert all(torch.equal(a, b) for a, b in zip(before, frontier, strict=True))
        assert torch.equal(first, logits_of(network, frontier, {group.name: masks}))
        assert _same(first, _expected(model, images, {group: masks}))


class _BatchSized(nn.Module):
    """Uses the number of images, which belongs to the chunk and not to the cache."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.linear = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4 * 64, 3)

    def forward(self, x):
        size = x.size(0)
        left, right = self.a(x).chunk(2, 1)
        x = self.b(torch.cat([right, left], 1))
        return self.linear(x.reshape(size, -1))


def test_chunk_sizes_are_not_baked_in():
    model, images, groups, generator = _prepared(_BatchSized)
    masks = _masks(groups[0], generator)
    network = MaskedNetwork(model, groups[:1], images[:3])
    assert network.method == "split", network.why_whole
    got = logits_of(network, network.prefix(images), {groups[0].name: masks})
    assert _same(got, _expected(model, images, {groups[0]: masks}))


def test_methods_and_their_errors():
    model, images, groups, _ = _prepared(ZOO["Branching"])
    with pytest.raises(UserError, match=r'The network cannot be split .* use method "whole" or "auto"'):
        MaskedNetwork(model, groups, images, method="split")
    with pytest.raises(UserError, match="must be one of auto, split, whole, got 'fast'"):
        MaskedNetwork(model, groups, images, method="fast")
    assert "cannot be split" in MaskedNetwork(model, groups, images).why_whole


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(8, 12, 3),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.ConvTranspose2d(8, 12, 3),
        nn.ConvTranspose2d(8, 12, 3, groups=2),
        nn.Linear(8, 5),
        nn.Conv1d(8, 4, 3, groups=2),
    ],
)
def test_weights_by_input_channel(module):
    weight = module.weight
    first = by_input(module, weight)
    assert len(first) == 8
    assert torch.equal(from_input(module, first), weight)


def test_folding_a_mask_equals_masking_the_input_bit_for_bit():
    group = _prepared(ZOO["Grouped"])[2][0]
    module, cut = nn.Conv2d(12, 16, 3, padding=1, groups=4), group.consumers[0]
    keep = torch.tensor([True, False, True])
    x = torch.randn(2, 12, 8, 8)
    folded = copy.deepcopy(module)
    folded.weight.data = fold(module, module.weight.data, cut, keep)
    x_masked = x.clone()
    x_masked[:, cut.channels[1]] = 0
    assert torch.equal(folded(x), module(x_masked))
