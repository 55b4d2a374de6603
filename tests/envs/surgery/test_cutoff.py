"""The cut-off: met within one filter, uniform where it says so, and full up to the edge of a step."""

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.surgery.cutoff import keep_best, spread_evenly
from keepdrop.envs.surgery.targets import Constraint, Constraints, Target, constraints_of
from keepdrop.errors import UserError
from stepped_meter import SteppedMeter, clock

CASES = {"chain": (small_cnn(), (1, 1, 8, 8)), "residual": (cifar_resnet(8), (1, 3, 16, 16))}
TARGETS = [*(Target(removed, of) for removed in (0.3, 0.5, 0.7) for of in ("groups", "network"))]
TARGETS += [Target(params=0.4), Target(bytes=60_000), Target(removed=0.3, of="network", params=0.5)]


def planned(case):
    model, shape = CASES[case]
    example = torch.zeros(shape)
    groups = find_groups(model.eval(), example).groups
    return model, groups, count_cost(model, example)


def random_scores(groups):
    generator = torch.Generator().manual_seed(0)
    return {group.name: torch.rand(group.n_filters, generator=generator) for group in groups}


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_target_is_met_within_one_filter(case, target):
    model, groups, cost = planned(case)
    scores, goal = random_scores(groups), constraints_of(target, model, cost, groups)
    masks = keep_best(goal, scores)
    kept = [int(masks[group.name].sum()) for group in groups]
    assert goal.holds(kept)
    # One more filter, the best of those that went, would miss it.
    left = [(scores[g.name][~masks[g.name]].max(), i) for i, g in enumerate(groups) if not masks[g.name].all()]
    kept[max(left)[1]] += 1
    assert not goal.holds(kept)


@pytest.mark.parametrize("step", [1, 3, 8])
@pytest.mark.parametrize(
    "target", [Target(latency=0.5), Target(milliseconds=9), Target(latency=0.7, params=0.4)], ids=str
)
def test_a_stepped_budget_is_held_and_used_up(step, target):
    model, groups, cost = planned("chain")
    scores, goal = random_scores(groups), constraints_of(target, model, cost, groups, clock(step))
    masks = keep_best(goal, scores)
    kept = [int(masks[group.name].sum()) for group in groups]
    assert goal.holds(kept)
    for position, group in enumerate(groups):
        if kept[position] < group.n_filters:  # nothing more fits, so nothing that costs nothing is missing
            assert not goal.holds([n + (i == position) for i, n in enumerate(kept)])
        mask, score = masks[group.name], scores[group.name]
        assert mask.all() or score[mask].min() > score[~mask].max()
    again = keep_best(goal, {name: each.clone() for name, each in scores.items()})
    assert all(torch.equal(masks[name], again[name]) for name in masks)


def test_filters_that_cost_nothing_are_kept():
    """17 filters take as long as 24: the ranking's cut leaves 17 of the second layer, and 24 are kept."""
    _, groups, _ = planned("chain")
    first, second = groups[0], groups[2]
    assert (first.n_filters, second.n_filters) == (16, 32)
    meter = SteppedMeter((first, second), step=8)  # whole: 1 + 2 + 4 ms
    goal = Constraints((Constraint("latency", 6 / 7, meter, 1 / 7),))
    scores = {first.name: torch.full((16,), 2.0), second.name: -torch.arange(32.0)}
    scores[first.name][15] = -16.5  # the last filter of the first layer comes after 17 of the second
    masks = keep_best(goal, scores)
    assert [int(mask.sum()) for mask in masks.values()] == [16, 24]
    assert masks[second.name].nonzero().flatten().tolist() == list(range(24))


def test_times_that_fall_with_width_do_not_break_it():
    """Measured tables are not monotone; the budget is held all the same."""
    _, groups, _ = planned("chain")

    class Bumpy(SteppedMeter):
        def cost(self, kept):
            return super().cost(kept) + 2e-3 * sum(n % 8 == 1 and n > 1 for n in kept)

    goal = Constraints((Constraint("latency", 0.6, Bumpy(tuple(groups)), 0.4),))
    masks = keep_best(goal, random_scores(groups))
    assert goal.holds([int(mask.sum()) for mask in masks.values()])


def test_even_spread_halves_every_layer():
    model, groups, cost = planned("residual")
    first = [group for group in groups if group.name.endswith("conv1") and group.name != "conv1"]
    goal = constraints_of(Target(0.5), model, cost, first)
    scores = {group.name: torch.randn(group.n_filters) for group in first}
    masks = keep_best(goal, {name: spread_evenly(score) for name, score in scores.items()})
    for name, mask in masks.items():
        assert mask.sum() == len(mask) // 2
        assert scores[name][mask].min() > scores[name][~mask].max()


def test_weights_shift_the_spread():
    scores = spread_evenly(torch.tensor([3.0, 1.0, 2.0, 0.0])), spread_evenly(torch.tensor([3.0, 1.0]), weight=2.0)
    assert scores[0].tolist() == [-0.125, -0.625, -0.375, -0.875]
    assert scores[1].tolist() == [-0.125, -0.375]


def test_best_filter_of_every_group_stays():
    model, groups, cost = planned("chain")
    scores = {group.name: torch.full((group.n_filters,), float(-i)) for i, group in enumerate(groups)}
    scores["conv5"][7] = -3.5
    masks = keep_best(constraints_of(Target(0.6), model, cost, groups), scores)
    assert masks["conv5"].nonzero().flatten().tolist() == [7] and masks["conv1"].all()


def test_a_target_that_cannot_be_met():
    model, groups, cost = planned("chain")
    goal = constraints_of(Target(0.9, "network"), model, cost, groups[:1])
    with pytest.raises(UserError, match=r"90 % of the MACs cannot be removed: with one filter per layer \d+\.\d % are"):
        keep_best(goal, {"conv1": torch.zeros(16)})
