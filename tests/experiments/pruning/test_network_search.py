"""Where the agent of a whole network starts, and that its decision is never worse than a choice without a search."""

from dataclasses import replace

import pytest
import torch
from digits_task import make_task
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.cutoff import keep_best, spread_evenly
from keepdrop.envs.surgery.limits import Limits
from keepdrop.envs.surgery.meters import removed
from keepdrop.envs.surgery.targets import Target
from keepdrop.errors import UserError
from keepdrop.experiments.deploy.clock import ProfileClock
from keepdrop.experiments.pruning.network_search import NetworkAgent, NetworkSearchSettings, best_of, projection
from stepped_meter import clock, stepped_profile

REPAIR = ReconstructionSettings(images=100, places=8)
TARGET = Target(0.5, "network")


def search(updates, **how):
    return NetworkSearchSettings(masks=4, images=60, agent=NetworkAgentSettings(updates=updates), **how)


@pytest.fixture
def one_shot():
    return OneShotTask(make_task(), REPAIR)


@pytest.mark.parametrize("start", ["reconstruction", "uniform"])
def test_an_untrained_agent_starts_where_it_is_told(one_shot, start):
    agent = NetworkAgent(search(0, start=start), one_shot)
    agent.choose(TARGET, seed=0)
    assert agent.policy is not None
    weights = agent.policy.log_weight.detach().exp()
    assert bool((weights == 1).all()) is (start == "uniform")
    assert (len(weights.unique()) == 1) is (start == "uniform")


@pytest.mark.parametrize("updates", [0, 2])
def test_the_decision_is_never_worse_on_the_reward_split_than_its_controls(one_shot, updates):
    agent = NetworkAgent(search(updates), one_shot)
    masks = agent.choose(TARGET, seed=0)
    facts = agent.facts
    assert set(facts["control_accuracy"]) == {"uniform l2", "reconstruction"}
    (_, (accuracy,)) = best_of(one_shot, [one_shot.joined(masks)])
    assert accuracy == facts["judged_accuracy"] >= max(facts["control_accuracy"].values())


def test_a_control_that_wins_is_named(one_shot, monkeypatch):
    """The agent's own masks are made useless: the decision then is the better control's, and says so."""
    agent = NetworkAgent(search(0), one_shot)
    task, worst = one_shot.task, torch.zeros(one_shot.n_filters, dtype=torch.bool)
    meter = task.constraints(TARGET).each[0].meter
    for group, part in one_shot.choices(torch.arange(one_shot.n_filters)).items():
        worst[part[: 1 + (group.n_filters > 8)]] = True
    assert removed(meter, [int(part.sum()) for part in one_shot.choices(worst).values()]) > 0.9
    real = best_of
    monkeypatch.setattr(
        "keepdrop.experiments.pruning.network_search.best_of",
        lambda where, candidates: real(where, [worst, *candidates[1:]]),
    )
    agent.choose(TARGET, seed=0)
    controls = agent.facts["control_accuracy"]
    assert agent.facts["decided_by"] == max(controls, key=lambda name: controls[name])


def test_the_controls_are_what_they_are_called(one_shot):
    agent = NetworkAgent(search(0), one_shot)
    agent.choose(TARGET, seed=0)
    norms = [torch.from_numpy(layer.observation.weights).square().sum(1) for layer in one_shot.layers]
    uniform = projection(one_shot, TARGET)(torch.cat([spread_evenly(each) for each in norms]))
    _, (accuracy,) = best_of(one_shot, [uniform])
    assert agent.facts["control_accuracy"]["uniform l2"] == accuracy


def test_widths_are_rounded_up_where_that_takes_no_more_time():
    """A device of steps of 4 channels and widths in twos: every layer keeps whole steps, as the rest is free."""
    limits, sizes = Limits(round_to=2), [group.n_filters for group in make_task().groups]
    one_shot = OneShotTask(make_task(clock=clock(step=4), limits=limits), None)
    goal, project = one_shot.task.constraints(Target(latency=0.7)), projection(one_shot, Target(latency=0.7))
    for seed in range(5):
        keep = project(torch.rand(one_shot.n_filters, generator=torch.Generator().manual_seed(seed)))
        kept = [int(part.sum()) for part in one_shot.named(keep).values()]
        assert goal.holds(kept) and all(n % 4 == 0 or n == full for n, full in zip(kept, sizes, strict=True)), kept


def test_exactly_these_widths_meet_a_target_of_time():
    """Off multiples of 4 a layer takes half as long again: a ranking that is just cut off comes out too slow."""
    task = make_task()
    profile = stepped_profile(task.model, task.example)
    sizes = [n for _, n in profile.groups]

    def slow(each):
        time = 0.2 + 0.8 * sum(k * (1.5 if k % 4 else 1) for k in each.kept) / sum(sizes)
        return replace(each, fraction=time)

    table = replace(profile.tables[0], samples=tuple(map(slow, profile.tables[0].samples)))
    one_shot = OneShotTask(make_task(clock=ProfileClock(replace(profile, tables=(table,)))), None)
    target, missed = Target(latency=0.6), 0
    goal, project = one_shot.task.constraints(target), projection(one_shot, target)
    for seed in range(6):
        scores = torch.rand(one_shot.n_filters, generator=torch.Generator().manual_seed(seed))
        plain = keep_best(goal, dict(zip((g.name for g in one_shot.groups), scores.split(sizes), strict=True)))
        missed += goal.missing([int(keep.sum()) for keep in plain.values()]) > 0
        kept = [int(part.sum()) for part in one_shot.named(project(scores)).values()]
        assert goal.missing(kept) <= 0 and goal.holds(kept)
        assert goal.seconds(kept) == goal.reached(kept)[0]["pruned"] > 0.5 * goal.each[0].meter.whole
    assert missed


def test_another_start_is_refused():
    with pytest.raises(UserError, match=r"network_search.start is 'unifrom'; expected one of reconstruction, uniform"):
        search(0, start="unifrom")
