"""MACs targets: counted like the surgery, met within one filter, and uniform where they say so."""

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.macs_target import MacsMeter, Target, keep_best, spread_evenly
from keepdrop.errors import UserError

CASES = {"chain": (small_cnn(), (1, 1, 8, 8)), "residual": (cifar_resnet(8), (1, 3, 16, 16))}


def planned(case):
    model, shape = CASES[case]
    example = torch.zeros(shape)
    groups = find_groups(model.eval(), example).groups
    return model, example, groups, count_cost(model, example)


@pytest.mark.parametrize("case", CASES)
def test_meter_counts_what_the_cut_network_costs(case):
    model, example, groups, cost = planned(case)
    kept = [max(1, group.n_filters * (3 + i) // 10) for i, group in enumerate(groups)]
    choices = {group: torch.arange(group.n_filters) < n for group, n in zip(groups, kept, strict=True)}
    after = count_cost(prune(model, choices), example)
    whole, own = (MacsMeter(model, cost, groups, of) for of in ("network", "groups"))
    assert whole.macs(kept) == pytest.approx(after.macs) and whole.whole == cost.macs
    producers = {cut.module for group in groups for cut in group.producers}
    assert own.macs(kept) == pytest.approx(sum(after.modules[name].macs for name in producers))
    assert own.whole == sum(cost.modules[name].macs for name in producers)


@pytest.mark.parametrize("of", ["groups", "network"])
@pytest.mark.parametrize("removed", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_target_is_met_within_one_filter(case, removed, of):
    model, _, groups, cost = planned(case)
    meter = MacsMeter(model, cost, groups, of)
    generator = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.n_filters, generator=generator) for group in groups}
    masks = keep_best(meter, scores, Target(removed, of))
    kept = [int(masks[group.name].sum()) for group in groups]
    assert meter.removed(kept) >= removed - 1e-9
    # One more filter, the best of those that went, would miss it.
    left = [(scores[g.name][~masks[g.name]].max(), i) for i, g in enumerate(groups) if not masks[g.name].all()]
    kept[max(left)[1]] += 1
    assert meter.removed(kept) < removed


def test_even_spread_halves_every_layer():
    model, _, groups, cost = planned("residual")
    first = [group for group in groups if group.name.endswith("conv1") and group.name != "conv1"]
    meter = MacsMeter(model, cost, first)
    scores = {group.name: torch.randn(group.n_filters) for group in first}
    masks = keep_best(meter, {name: spread_evenly(score) for name, score in scores.items()}, Target(0.5))
    for name, mask in masks.items():
        assert mask.sum() == len(mask) // 2
        assert scores[name][mask].min() > scores[name][~mask].max()


def test_weights_shift_the_spread():
    scores = spread_evenly(torch.tensor([3.0, 1.0, 2.0, 0.0])), spread_evenly(torch.tensor([3.0, 1.0]), weight=2.0)
    assert scores[0].tolist() == [-0.125, -0.625, -0.375, -0.875]
    assert scores[1].tolist() == [-0.125, -0.375]


def test_best_filter_of_every_group_stays():
    model, _, groups, cost = planned("chain")
    meter = MacsMeter(model, cost, groups)
    scores = {group.name: torch.full((group.n_filters,), float(-i)) for i, group in enumerate(groups)}
    scores["conv5"][7] = -3.5
    masks = keep_best(meter, scores, Target(0.6))
    assert masks["conv5"].nonzero().flatten().tolist() == [7] and masks["conv1"].all()


def test_refusals():
    model, _, groups, cost = planned("chain")
    with pytest.raises(UserError, match=r"A target of 50 was given; .*did you mean 0.5\?"):
        Target(50)
    with pytest.raises(UserError, match="expected a fraction between 0 and 1"):
        Target(0.0)
    with pytest.raises(UserError, match=r"targets\.of is 'layers'; expected one of groups, network"):
        Target(0.5, "layers")
    meter = MacsMeter(model, cost, groups[:1], "network")
    with pytest.raises(UserError, match=r"90 % of the MACs cannot be removed: with one filter per layer \d+\.\d % are"):
        keep_best(meter, {"conv1": torch.zeros(16)}, Target(0.9, "network"))
