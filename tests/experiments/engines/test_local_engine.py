"""The local engine and tasks spread over it: one state a worker, results in order, the same decisions."""

import os

import pytest
import torch
from digits_task import make_task
from keepdrop import LocalEngine
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.targets import Target
from keepdrop.errors import UserError
from keepdrop.experiments.engines.spread_task import JudgingTask, SpreadTask, spread_over
from keepdrop.experiments.pruning.network_search import NetworkAgent, NetworkSearchSettings

REPAIR = ReconstructionSettings(images=100, places=8)


def make(start):
    return {"start": start, "process": os.getpid(), "calls": 0}


def add(state, item):
    if item < 0:
        raise UserError(f"{item} came.")
    state["calls"] += 1
    return state["start"] + item, state["process"], state["calls"]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_order_and_every_worker_makes_one_state(workers):
    with LocalEngine(workers).open(make, 10, lost="gone") as spread:
        found = spread.in_order(add, range(6))
        again = list(spread.as_done(add, [1]))
        with pytest.raises(UserError, match=r"^-1 came\.$"):
            spread.in_order(add, [-1])
    assert [value for value, _, _ in found] == list(range(10, 16)) and again[0][0] == 11
    processes = {process for _, process, _ in found}
    assert len(processes) <= workers and (os.getpid() in processes) is (workers == 1)
    calls = [max(each[2] for each in found if each[1] == process) for process in processes]
    assert sum(calls) == 6  # states last over items


@pytest.mark.parametrize("workers", [1.5, 2.0, "two", 0, float("nan")])
def test_workers_are_a_whole_number(workers):
    with pytest.raises(UserError, match=r"workers is \S+; expected a (whole )?number from 1 to 1,024\."):
        LocalEngine(workers)


def test_this_process_takes_the_state_that_it_has():
    own = make(1)
    with LocalEngine().open(make, 5, lost="gone", here=own) as spread:
        assert spread.in_order(add, [2]) == [(3, os.getpid(), 1)] and own["calls"] == 1


@pytest.fixture(scope="module")
def one_shot():
    return OneShotTask(make_task(), REPAIR)


def test_what_travels_judges_as_the_whole_task_does(one_shot):
    """Fit images beyond those of the repair, and the report split, stay behind."""
    small = JudgingTask(one_shot.task, REPAIR.images)
    assert len(small.splits.fit) == len(small.splits.report) == len(one_shot.task.splits.reward)
    for count in (7, REPAIR.images):
        assert torch.equal(small.fit_images(count)[0], one_shot.task.fit_images(count)[0])
    masks = torch.rand(3, one_shot.n_filters, generator=torch.Generator().manual_seed(0)) > 0.3
    some = torch.arange(0, 250, 3)
    assert OneShotTask(small, REPAIR).outcomes(masks, some) == one_shot.outcomes(masks, some)


def test_a_search_over_processes_decides_the_same(one_shot):
    settings = NetworkSearchSettings(masks=4, images=60, agent=NetworkAgentSettings(updates=1))

    def decided(where):
        agent = NetworkAgent(settings, where)
        return {name: keep.tolist() for name, keep in agent.choose(Target(0.5, "network"), 0).items()}, agent.facts

    with spread_over(LocalEngine(), one_shot) as same:
        assert same is one_shot
    with spread_over(LocalEngine(2), one_shot) as spread:
        assert isinstance(spread, SpreadTask) and spread.spread.count == 2
        there = decided(spread)
        with pytest.raises(ValueError, match="masks of the network have shape"):
            spread.outcomes(torch.ones(one_shot.n_filters))
        with pytest.raises(ValueError, match="keeps no filter at all"):
            spread.outcomes(torch.zeros(2, one_shot.n_filters))
    assert there == decided(one_shot)
