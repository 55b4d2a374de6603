"""Which memory layout a network takes: tried once, in both modes, without a trace; and everything asks for it."""

from types import SimpleNamespace

import pytest
import torch
from keepdrop.envs.evaluation.mask_evaluator import MaskEvaluator, correct_flags
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks import memory_layout
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import hash_state
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.networks.memory_layout import CHANNELS_LAST, CONTIGUOUS, arranged, common_layout, layout_of, suited
from keepdrop.envs.repair.reconstruction import Reconstruction
from keepdrop.envs.surgery.cutting import prune
from keepdrop.experiments.deploy.latency import measure_latency
from keepdrop.experiments.oracle.single_removals import filter_oracle
from torch import nn
from torch.nn import functional as F
from zoo import Flattened, MaxOverChannels, ResidualStream, Viewed, ViewedBySize

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0])


class ViewedInTraining(Flattened):
    """A head that runs in training alone, as GoogLeNet's do."""

    def forward(self, x):
        if self.training:
            F.relu(self.conv(x)).view(len(x), -1)
        return super().forward(x)


class MixedUp(Flattened):
    """Looks at its memory itself: channels-last runs, and answers otherwise."""

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.linear(F.relu(self.hidden(torch.as_strided(x, (len(x), 96), (96, 1)))))


class Noisy(Flattened):
    """Dropout that is always on."""

    def forward(self, x):
        return super().forward(F.dropout(x, training=True))


class InObject(MixedUp):
    """The same, and its answer is in an object."""

    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x))


@pytest.mark.parametrize("make", [Viewed, ViewedBySize, MaxOverChannels, MixedUp, InObject])
def test_networks_that_know_one_layout(make):
    model = make().eval()
    assert layout_of(model, IMAGES) == layout_of(model, arranged(IMAGES, CHANNELS_LAST)) == CONTIGUOUS


@pytest.mark.parametrize("make", [Flattened, ResidualStream, lambda: small_cnn(in_channels=3), Noisy])
@pytest.mark.parametrize("training", [False, True])
def test_networks_that_take_channels_last(make, training):
    assert layout_of(make(), IMAGES, training=training) == CHANNELS_LAST


def test_single_channel_images_that_lie_both_ways():
    grey = IMAGES[:, :1]
    assert layout_of(Viewed(1), grey) == layout_of(Viewed(1), grey, training=True) == CONTIGUOUS


def test_training_is_looked_at_by_itself():
    model = ViewedInTraining()
    assert layout_of(model, IMAGES) == CHANNELS_LAST and layout_of(model, IMAGES, training=True) == CONTIGUOUS


def test_volumes_and_signals_have_one_layout():
    assert layout_of(nn.Conv1d(3, 2, 3), torch.randn(2, 3, 8)) == CONTIGUOUS
    assert layout_of(nn.Conv3d(3, 2, 3), torch.randn(2, 3, 8, 8, 8)) == CONTIGUOUS


def test_one_layout_for_several_networks():
    assert common_layout([Flattened(), ResidualStream()], IMAGES) == CHANNELS_LAST
    assert common_layout([Flattened(), Viewed()], IMAGES) == CONTIGUOUS


@pytest.mark.parametrize("training", [False, True])
def test_trying_leaves_no_trace_and_happens_once(training, monkeypatch):
    model = ResidualStream().train()
    before, random = hash_state(model), torch.get_rng_state()
    layout_of(model, IMAGES, training=training)
    assert hash_state(model) == before and torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(each.grad is None and each.is_contiguous() for each in model.parameters())
    monkeypatch.setattr(memory_layout, "_tried", None)
    layout_of(model, IMAGES[:1], training=training)


@pytest.mark.parametrize("make", [Viewed, MaxOverChannels])
def test_everything_that_reorders_images_takes_them(make):
    torch.manual_seed(0)
    model = make().eval()
    group = find_groups(model, IMAGES).groups[0]
    masks = {group.name: torch.arange(group.n_filters)[None] % 3 > 0}
    with torch.no_grad():
        right = model(IMAGES).argmax(1) == LABELS
    assert torch.equal(correct_flags(model, IMAGES, LABELS), right)
    for method in ("split", "whole"):
        evaluator = MaskEvaluator(model, [group], IMAGES, LABELS, method=method)
        everything = {group.name: torch.ones(1, group.n_filters, dtype=torch.bool)}
        assert torch.equal(evaluator.correct_per_image(everything)[0], right)
        small = MaskEvaluator(model, [group], IMAGES, LABELS, method=method, cache_gib=0, batch=2)
        assert torch.equal(small.correct(masks), evaluator.correct(masks))
    assert len(filter_oracle(model, group, IMAGES, LABELS).loss_change) == group.n_filters
    repaired = Reconstruction(model, IMAGES).cut({group: masks[group.name][0]})
    assert repaired(IMAGES).shape == (5, 4)
    timed = measure_latency({"base": model, "pruned": repaired}, IMAGES[:1], batch_sizes=(1, 2), repeats=1, warmup=0)
    assert len(timed) == 4


def test_a_network_that_takes_channels_last_gets_images_and_weights_so():
    seen = []
    model = small_cnn(in_channels=3, n_classes=4, widths=(4, 4)).eval()
    model.conv2.register_forward_hook(lambda module, inputs, _: seen.append((inputs[0], module.weight)))
    correct_flags(model, IMAGES, LABELS)
    assert seen[-1][0].is_contiguous(memory_format=CHANNELS_LAST)
    assert seen[-1][1].is_contiguous()


def test_images_in_an_order_that_the_network_takes():
    """As arrays come, channels-last: rearranged for a network with `view`, left alone for one that takes them."""
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    viewed, pooled = Viewed().eval(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    assert suited(pooled, images) is images
    found = suited(viewed, images)
    assert found.is_contiguous() and torch.equal(found, images)
    assert count_cost(viewed, images[:1]) == count_cost(viewed, found[:1])
    assert find_groups(viewed, images).names == find_groups(viewed, found).names


@pytest.mark.parametrize(("make", "layout"), [(ResidualStream, CHANNELS_LAST), (Viewed, CONTIGUOUS)])
def test_a_cut_network_has_the_layout_of_its_source(make, layout, monkeypatch):
    model = make().eval()
    groups = find_groups(model, IMAGES).groups
    smaller = prune(model, {groups[0]: torch.arange(groups[0].n_filters) > 0})  # before anything is known
    assert layout_of(model, IMAGES) == layout_of(smaller, IMAGES) == layout
    smaller = prune(model, {groups[0]: torch.arange(groups[0].n_filters) > 0})
    monkeypatch.setattr(memory_layout, "_tried", lambda *_: pytest.fail("tried again"))
    assert layout_of(smaller, IMAGES) == layout
