"""Residual branches that may vanish: which ones are found, and that masked equals cut with no filter left."""

import pytest
import torch
from blocks import MAKERS, NONE_VANISH, trained_looking
from keepdrop.envs.evaluation.masked_network import MaskedNetwork
from keepdrop.envs.groups import verification
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.filter_group import Branch, coupled
from keepdrop.envs.surgery.group_cost import pruned_cost
from keepdrop.envs.surgery.group_matching import regrouped
from keepdrop.envs.surgery.masking import masked_inputs
from keepdrop.envs.surgery.meters import MacsMeter, WeightsMeter
from keepdrop.errors import UserError
from torch import nn

EXPECTED = {
    "basic": ["blocks.0.conv1", "blocks.1.conv1", "blocks.2.conv1"],
    "bottleneck": ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2"],
    "pre-activation": ["blocks.0.conv1", "blocks.1.conv1"],
    "inverted": ["blocks.0.conv.0", "blocks.1.conv.0"],
    "gate": ["blocks.0.conv1", "blocks.1.conv1"],
    "dropout": ["blocks.0.conv1", "blocks.1.conv1"],
    "convnext": ["blocks.0.wide", "blocks.1.wide"],
}
IMAGES = torch.randn(3, 3, 13, 13, generator=torch.Generator().manual_seed(5))


def drawn(plan, seed):
    """Masks of all groups, of which some that may keep nothing do."""
    generator = torch.Generator().manual_seed(seed)
    choices = {}
    for group in plan.groups:
        keep = torch.rand(group.n_filters, generator=generator) < 0.6
        keep[0] = True
        choices[group] = keep & (group.least == 1 or bool(torch.rand(1, generator=generator) < 0.5))
    return choices


def masked(model, choices, images=IMAGES):
    with torch.no_grad(), masked_inputs(model, choices):
        return model(images)


@pytest.mark.parametrize("name", MAKERS)
def test_masked_equals_cut_whatever_vanishes(name):
    model = trained_looking(MAKERS[name])
    plan = find_groups(model, IMAGES, whole_blocks=True)
    assert [group.name for group in plan.groups if group.least == 0] == EXPECTED[name]
    cost = count_cost(model, IMAGES)
    for seed in range(3):
        choices = coupled(drawn(plan, seed))
        smaller = prune(model, choices)
        with torch.no_grad():
            assert torch.allclose(smaller(IMAGES), masked(model, choices), rtol=1e-4, atol=1e-5)
        counts = {group: int(keep.sum()) for group, keep in choices.items()}
        after, kept = count_cost(smaller, IMAGES), list(counts.values())
        assert pruned_cost(model, cost, counts) == (after.macs, after.params)
        assert MacsMeter(model, cost, plan.groups, "network").cost(kept) == pytest.approx(after.macs)
        assert WeightsMeter(model, plan.groups).cost(kept) == pytest.approx(after.params)


@pytest.mark.parametrize("method", ["split", "whole", "stacked"])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "gate"])
def test_the_fast_evaluator_agrees(name, method):
    model = trained_looking(MAKERS[name])
    plan = find_groups(model, IMAGES, whole_blocks=True)
    several = [drawn(plan, seed) for seed in range(3)]
    masks = {group.name: torch.stack([choices[group] for choices in several]) for group in plan.groups}
    stack = method == "stacked"
    network = MaskedNetwork(model, plan.groups, IMAGES, method="split" if stack else method, stack=stack)
    frontier = network.prefix(IMAGES)
    for number, choices in enumerate(several):
        if stack:
            answer = network.together(masks)(frontier)[number]
        else:
            with network.masked(masks, number) as run:
                answer = run(frontier)
        assert torch.allclose(answer, masked(model, choices), rtol=1e-4, atol=1e-5)
    everything = {group.name: torch.ones(1, group.n_filters, dtype=torch.bool) for group in plan.groups}
    with network.masked(everything, 0) as run, torch.no_grad():
        assert torch.allclose(run(frontier), model(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NONE_VANISH)
def test_nothing_vanishes_without_a_shortcut_of_its_own(name):
    model = trained_looking(NONE_VANISH[name])
    plan = find_groups(model, IMAGES, whole_blocks=True)
    assert plan.groups and all(group.least == 1 and group.branch is None for group in plan.groups)
    group = plan.groups[0]
    with pytest.raises(UserError, match="keeps none of its"):
        prune(model, {group: torch.zeros(group.n_filters, dtype=torch.bool)})


def test_nothing_vanishes_unless_asked():
    plan = find_groups(trained_looking(MAKERS["basic"]), IMAGES)
    assert all(group.least == 1 and group.branch is None for group in plan.groups)


def test_every_block_of_the_built_in_resnet_may_vanish():
    model = cifar_resnet(depth=8).eval()
    plan = find_groups(model, torch.randn(2, 3, 32, 32), whole_blocks=True)
    assert [group.name for group in plan.groups if group.least == 0] == [f"layer{n}.0.conv1" for n in (1, 2, 3)]


class FixedSize(nn.Module):
    """Flattens its gate to a written-down number of channels, which a branch without filters no longer has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.mix = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 8)

    def forward(self, x):
        inner = torch.relu(self.conv1(x))
        return x + self.conv2(inner * self.mix(inner.mean((2, 3)).view(-1, 8))[:, :, None, None])


def test_a_branch_that_does_not_run_without_its_channels_stays():
    model = trained_looking(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), FixedSize(), nn.Flatten(), nn.Linear(8 * 169, 3)))
    assert all(group.least == 1 for group in find_groups(model, IMAGES, whole_blocks=True).groups)


def test_branches_that_go_together_are_trusted_as_each_alone(monkeypatch):
    model, asked = trained_looking(MAKERS["basic"]), []
    together = find_groups(model, IMAGES, whole_blocks=True)
    monkeypatch.setattr(verification, "_side_by_side", lambda found: asked.extend(found) or [[each] for each in found])
    alone = find_groups(model, IMAGES, whole_blocks=True)
    assert [(each.name, each.least) for each in together.groups] == [(each.name, each.least) for each in alone.groups]
    assert len(asked) == len([each for each in alone.groups if each.least == 0]) == 3


def test_one_branch_that_cannot_go_leaves_the_others(monkeypatch):
    usual, asked = verification.Verifier._vanish, []

    def but_one(self, branches, groups):
        asked.append(len(branches))
        return not any(each.tail.startswith("blocks.1") for each in branches) and usual(self, branches, groups)

    monkeypatch.setattr(verification.Verifier, "_vanish", but_one)
    plan = find_groups(trained_looking(MAKERS["basic"]), IMAGES, whole_blocks=True)
    assert [each.name for each in plan.groups if each.least == 0] == ["blocks.0.conv1", "blocks.2.conv1"]
    assert asked == [3, 1, 1, 1]


def test_a_branch_and_one_inside_it_are_never_looked_at_together():
    first, outer = Branch(("a.conv2",), ("a.conv1",), (), False), Branch(("b.conv2",), ("b.conv1", "b.in"), (), False)
    inner, last = Branch(("b.in.conv2",), ("b.in.conv1",), (), False), Branch(("c",), ("d",), (), False)
    assert verification._side_by_side([first, inner, outer, last]) == [[first, inner, last], [outer]]


def test_followed_groups_are_those_of_the_cut_network():
    model = trained_looking(MAKERS["basic"])
    plan = find_groups(model, IMAGES, whole_blocks=True)
    gone = plan.groups[[group.name for group in plan.groups].index("blocks.1.conv1")]
    choices = {group: torch.ones(group.n_filters, dtype=torch.bool) for group in plan.groups}
    choices[gone] = torch.zeros(gone.n_filters, dtype=torch.bool)
    followed = regrouped(plan.groups, model, choices)
    assert gone.name not in [group.name for group in followed]

    def places(group):
        return {(cut.module, cut.axis, cut.channels.tobytes()) for cut in group.cuts}

    found = find_groups(prune(model, choices), IMAGES).groups
    assert sorted(map(sorted, map(places, followed))) == sorted(map(sorted, map(places, found)))
    assert all(group.cuts[0].kind == "producer" for group in followed)
