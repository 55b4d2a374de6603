"""Targets: numbers that make no sense are refused, several hold at once, and old agents' targets are read."""

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.surgery.targets import Target, constraints_of
from keepdrop.errors import UserError
from stepped_meter import clock


@pytest.fixture(scope="module")
def network():
    model, example = small_cnn().eval(), torch.zeros(1, 1, 8, 8)
    return model, count_cost(model, example), find_groups(model, example).groups


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, r"names no resource; expected one or more of removed, latency, milliseconds, params, bytes"),
        ({"removed": 50}, r"A target of 50 was given; .*did you mean 0.5\?"),
        ({"removed": 0.0}, "expected a fraction between 0 and 1"),
        ({"removed": 0.5, "of": "layers"}, r"targets\.of is 'layers'; expected one of groups, network"),
        ({"latency": 60}, r"target\.latency is 60; .*time that may be left, between 0 and 1; did you mean 0.6\?"),
        ({"latency": float("nan")}, r"target\.latency is nan; expected"),
        ({"params": 1.0}, r"target\.params is 1; .*parameters that may be left"),
        ({"milliseconds": 0.0}, r"target\.milliseconds is 0; expected a time above 0"),
        ({"milliseconds": float("inf")}, r"target\.milliseconds is inf; expected a time above 0"),
        ({"bytes": 0}, r"target\.bytes is 0; expected the size of a file"),
    ],
)
def test_numbers_that_make_no_sense(given, sentence):
    with pytest.raises(UserError, match=sentence):
        Target(**given)


def test_facts_are_read_as_they_were_and_as_they_are():
    old = {"removed": 0.5, "of": "network"}
    assert Target(**old).facts() == old
    both = Target(removed=0.3, of="network", latency=0.6, bytes=1000)
    assert both.facts() == {"removed": 0.3, "of": "network", "latency": 0.6, "bytes": 1000}
    assert Target(**both.facts()) == both
    assert Target(params=0.5).facts() == {"params": 0.5} and Target(params=0.5).resources == ("params",)


def test_everything_asked_for_has_to_hold(network):
    model, cost, groups = network
    goal = constraints_of(Target(removed=0.2, of="network", milliseconds=12, params=0.6), model, cost, groups, clock())
    kept = [group.n_filters for group in groups]
    assert [each.holds(kept) for each in goal.each] == [False, False, False]
    kept = [1] * len(groups)
    assert goal.holds(kept)
    by_name = {each["resource"]: each for each in goal.reached(kept)}
    assert list(by_name) == ["removed", "milliseconds", "params"]
    assert by_name["milliseconds"]["pruned"] == pytest.approx(1e-3 * (1 + len(groups)))
    assert by_name["params"]["dense"] == cost.params and by_name["removed"]["unit"] == "MACs"
    tighter = goal.tightened([group.n_filters for group in groups], 0.01)
    assert [b.removed - a.removed for a, b in zip(goal.each, tighter.each, strict=True)] == pytest.approx([0.01] * 3)
    assert goal.tightened(kept, 0.01) == goal


def test_what_a_filter_saves_where_time_has_steps(network):
    """From 16 filters the next one saves nothing, but nine of them together save a step."""
    model, cost, groups = network
    goal = constraints_of(Target(latency=0.5), model, cost, groups, clock(step=8))
    kept = [group.n_filters for group in groups]
    saved = goal.saved(kept, 0)
    assert kept[0] == 16 and len(saved) == 15
    assert saved[:7] == pytest.approx([0.0] * 7, abs=1e-12) and saved[7:] == pytest.approx([1e-3] * 8)
    alone = constraints_of(Target(0.5, "network"), model, cost, groups)
    meter = alone.each[0].meter
    one = meter.cost(kept) - meter.cost([15, *kept[1:]])
    assert alone.saved(kept, 0) == [one * fewer for fewer in range(1, 16)]


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (Target(0.999, "network"), r"99\.9 % of the MACs cannot be removed: with one filter per layer \d+\.\d % are"),
        (Target(latency=0.01), r"target\.latency=0\.01 cannot be met: with one filter per layer [0-9.]+ of .* ms .*"),
        (Target(milliseconds=0.5), r"target\.milliseconds=0\.5 cannot be met: .* of .* ms"),
        (Target(milliseconds=10**6), r"milliseconds=1e\+06 would remove nothing: the dense network has .* ms; ask"),
        (Target(bytes=10), r"target\.bytes=10 cannot be met: .* of .* bytes"),
        (Target(params=0.0001), r"target\.params=0\.0001 cannot be met: .* of .* parameters"),
    ],
)
def test_what_cannot_be_met_is_one_sentence(network, target, sentence):
    model, cost, groups = network
    with pytest.raises(UserError, match=sentence):
        constraints_of(target, model, cost, groups, clock()).check()


def test_the_fewest_filters_that_limits_leave_count(network):
    model, cost, groups = network
    goal = constraints_of(Target(0.9, "network"), model, cost, groups)
    goal.check()
    with pytest.raises(UserError, match=r"cannot be removed: under surgery.round_to, min_kept and protect .* % are"):
        goal.check([group.n_filters // 2 for group in groups])


def test_time_needs_a_profile(network):
    with pytest.raises(UserError, match=r"target.latency needs the times of this device; give a profile"):
        constraints_of(Target(latency=0.5), *network)
