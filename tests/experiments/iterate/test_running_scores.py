"""Scores read off a training step against the observation's own pass; groups after a cut against found ones."""

import copy

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.observation import STATISTIC_NAMES, observe
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.group_matching import regrouped
from keepdrop.experiments.iterate.running_scores import RUNNING, collecting
from torch import nn
from torch.nn import functional


class Shared(nn.Module):
    """One group read by two convolutions, one of them twice, and a concatenation read in one go."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 5, 1)
        self.last = nn.Linear(10 * 4, 4)

    def forward(self, images):
        x = self.first(images).relu()
        y = torch.cat([self.left(x) + self.left(x.flip(-1)), self.right(x)], dim=1)
        return self.last(functional.adaptive_avg_pool2d(y.relu_(), 2).flatten(1))


CASES = {
    "chain": (lambda: small_cnn(in_channels=3, widths=(6, 5, 7, 4, 6)), (3, 8, 8)),
    "residual": (lambda: cifar_resnet(8, widths=(4, 6, 8)), (3, 16, 16)),
    "shared": (Shared, (3, 8, 8)),
}


def made(case):
    torch.manual_seed(0)
    build, shape = CASES[case]
    model = build().eval()
    images, labels = torch.randn(7, *shape), torch.arange(7) % 4
    return model, find_groups(model, images[:1]).groups, images, labels


@pytest.mark.parametrize("case", CASES)
def test_a_training_step_gives_what_the_observation_measures(case):
    """In evaluation mode, without an update, both see the same activations and gradients."""
    model, groups, images, labels = made(case)
    with collecting(model, groups) as scores:
        for rows in (slice(0, 4), slice(4, 7)):
            functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        with torch.no_grad():
            model(images)  # not a training step
    for group in groups:
        statistics = observe(model, group, images, labels).statistics
        for name in RUNNING:
            expected = torch.from_numpy(statistics[:, STATISTIC_NAMES.index(name)]).double()
            assert scores.column(group.name, name) == pytest.approx(expected, rel=1e-3, abs=1e-7), (group.name, name)


def test_gradients_are_those_of_the_bare_network():
    model, groups, images, labels = made("shared")
    bare = copy.deepcopy(model)
    with collecting(model, groups):
        functional.cross_entropy(model(images), labels).backward()
    functional.cross_entropy(bare(images), labels).backward()
    for ours, theirs in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nothing_trained_nothing_known():
    model, groups, _, _ = made("chain")
    with collecting(model, groups) as scores, pytest.raises(ValueError, match="nothing was trained"):
        scores.column(groups[0].name, "taylor")


@pytest.mark.parametrize("case", CASES)
def test_groups_after_a_cut_are_those_found_anew(case):
    model, groups, images, _ = made(case)
    generator = torch.Generator().manual_seed(1)
    followed = groups
    for _ in range(2):
        masks = {group: torch.rand(group.n_filters, generator=generator) < 0.7 for group in followed[:-1]}
        for mask in masks.values():
            mask[:2] = True  # a group of one filter is not found again
        after = regrouped(followed, model, masks)
        model = prune(model, masks)
        found = {group.name: group for group in find_groups(model, images[:1]).groups}
        for group in after:
            theirs = {(cut.module, cut.axis): cut for cut in found[group.name].cuts}
            assert group.n_filters == found[group.name].n_filters and len(theirs) == len(group.cuts)
            for cut in group.cuts:
                assert (cut.channels == theirs[cut.module, cut.axis].channels).all()
                assert cut.kind == theirs[cut.module, cut.axis].kind
        followed = after
