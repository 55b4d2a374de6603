"""Successive halving: who is trained and for how long, that controls stay, and that a kill loses nothing."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digits_task import make_task
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings
from keepdrop.envs.evaluation.mask_evaluator import accuracy_on
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.targets import Target
from keepdrop.errors import UserError
from keepdrop.experiments.pruning.halving import Candidate, Halving, HalvingSettings, Training
from keepdrop.experiments.pruning.network_search import NetworkAgent, NetworkSearchSettings
from keepdrop.experiments.training.augment import RandomCropFlip
from keepdrop.experiments.training.loop import fit_network
from keepdrop.experiments.training.train_settings import TrainSettings

REPAIR = ReconstructionSettings(images=100, places=8)
TARGET = Target(0.5, "network")
TRAIN = TrainSettings(batch_size=32, distill_weight=0.5)


@pytest.fixture(scope="module")
def one_shot():
    return OneShotTask(make_task(), REPAIR)


def search(candidates, minibatches, updates=2):
    halving = HalvingSettings(candidates, minibatches)
    return NetworkSearchSettings(masks=4, images=60, agent=NetworkAgentSettings(updates=updates), halving=halving)


class Scripted(Halving):
    """Halving whose trainings end as they are told to, by name and minibatches."""

    def __init__(self, settings, after):
        super().__init__(settings, OneShotTask(make_task(), REPAIR), Training(), seed=0)
        self.after, self.trained = after, []

    def _accuracy(self, candidate, minibatches):
        self.trained.append((candidate.name, minibatches))
        return self.after[candidate.name, minibatches]


def candidate(name, repaired, control=False):
    bits = int.from_bytes(name.encode(), "big")
    return Candidate(name, torch.tensor([bool(bits >> place & 1) for place in range(24)]), repaired, control)


def test_each_rung_trains_fewer_for_longer_and_the_last_one_decides():
    found = [candidate(name, 0.5 + place / 100) for place, name in enumerate("abcdef")]
    found += [candidate("u", 0.1, control=True), candidate("v", 0.2, control=True)]
    after = {(name, 10): 0.6 for name in "cdef"} | {("e", 10): 0.7, ("u", 10): 0.4, ("v", 10): 0.3}
    after |= {("e", 90): 0.8, ("f", 90): 0.9, ("u", 90): 0.85}
    told = []
    halving = Scripted(HalvingSettings([5, 3], [10, 90]), after)
    halving.training = Training(report=told.append)
    best = halving.best(found)
    # Both controls are trained, though the worst, and the better one again; ties keep the order of the repaired ones.
    assert halving.trained == [(name, 10) for name in "fedvu"] + [(name, 90) for name in "efu"]
    assert (best.name, best.accuracy, best.repaired) == ("f", 0.9, 0.55)
    assert [(each.done, each.total) for each in told] == [(n, 8) for n in range(1, 9)]
    assert str(told[0]) == "f: 55.0 % repaired, 60.0 % after 10 minibatches"
    assert [rung["minibatches"] for rung in halving.rungs] == [10, 90]
    assert halving.rungs[1]["candidates"][1] == {"name": "u", "repaired": 0.1, "trained": 0.85}


def test_a_control_that_ends_best_decides_and_harm_is_not_counted():
    found = [candidate("a", 0.6), candidate("b", 0.5), candidate("u", 0.3, control=True)]
    after = {("a", 10): 0.1, ("b", 10): 0.4, ("u", 10): 0.2, ("a", 50): 0.2, ("u", 50): 0.7}
    assert Scripted(HalvingSettings([3, 2], [10, 50]), after).best(found).name == "u"
    # The training made `a` worse: it counts as repaired, which a guarded fine-tuning would keep.
    after[("u", 50)] = 0.55
    assert Scripted(HalvingSettings([3, 2], [10, 50]), after).best(found).accuracy == 0.6


def test_equal_masks_are_trained_once_and_are_the_control():
    same = candidate("u", 0.5, control=True)
    found = [replace(same, name="agent", control=False), same, candidate("b", 0.4)]
    halving = Scripted(HalvingSettings([3], [10]), {("u", 10): 0.6, ("b", 10): 0.5})
    assert halving.best(found).name == "u" and halving.trained == [("u", 10), ("b", 10)]


def test_a_candidate_is_trained_as_a_fine_tuning_trains(one_shot):
    """Ten minibatches of the schedule, from the repaired network, at the rate that so few can use."""
    keep = torch.cat([torch.arange(group.n_filters) % 2 == 0 for group in one_shot.groups])
    training = Training(replace(TRAIN, top_lr=0.1), RandomCropFlip(1, flip=False))
    halving = Halving(HalvingSettings([2], [10]), one_shot, training, seed=0)
    best = halving.best([Candidate("a", keep, 0.0)])
    model, fit = one_shot.cut(keep), one_shot.task.splits.fit
    per_epoch = -(-len(fit) // 32)
    settings = replace(TRAIN, lr=0.0045, epochs=10 / per_epoch)  # 0.1 times the root of 10 / 5000
    options = {"augment": training.augment, "teacher": one_shot.task.model, "seed": halving.seed}
    assert fit_network(model, fit, settings, **options).n_steps == 10
    assert best.accuracy == accuracy_on(model, one_shot.task.splits.reward)


def test_the_decision_after_training_is_never_worse_than_a_control(one_shot):
    told = []
    agent = NetworkAgent(search([4, 2], [5, 15]), one_shot, training=Training(TRAIN, report=told.append))
    first = agent.choose(TARGET, seed=0)
    facts = agent.facts
    assert {"uniform l1", "uniform l2", "uniform taylor", "reconstruction"} < set(facts["control_accuracy"])
    last = facts["halving"][-1]["candidates"]
    controls = {*facts["control_accuracy"]}
    assert controls & {each["name"] for each in last} and not controls >= {each["name"] for each in last}
    assert facts["trained_accuracy"] == last[0]["trained"] >= max(each["trained"] for each in last)
    assert facts["decided_by"] == last[0]["name"] and facts["judged_accuracy"] == last[0]["repaired"]
    assert len(told) == told[-1].done == told[-1].total
    again = NetworkAgent(search([4, 2], [5, 15]), one_shot, training=Training(TRAIN))
    second = again.choose(TARGET, seed=0)
    assert again.facts == facts and all(torch.equal(first[name], second[name]) for name in first)


def test_without_candidates_nothing_is_trained(one_shot):
    agent = NetworkAgent(search([], [5, 15], updates=0), one_shot)
    agent.choose(TARGET, seed=0)
    assert "halving" not in agent.facts and set(agent.facts["control_accuracy"]) == {"uniform l2", "reconstruction"}


KILLED = """
import os, signal, sys, torch
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from test_halving import REPAIR, TARGET, TRAIN, NetworkAgent, OneShotTask, Training, make_task, search
torch.set_num_threads(1)
kill = lambda trained: os.kill(os.getpid(), signal.SIGKILL) if trained.done == 3 else None
task = OneShotTask(make_task(), REPAIR)
NetworkAgent(search([4, 2], [5, 15]), task, None, Path(sys.argv[3]), Training(TRAIN, report=kill)).choose(TARGET, 0)
"""


def test_a_kill_amid_the_rungs_loses_nothing(one_shot, tmp_path, monkeypatch):
    path, here = tmp_path / "state", Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(here), str(here.parents[1] / "support"), str(path)]
    assert subprocess.run(command, env={**os.environ, "PYTHONWARNINGS": "ignore"}).returncode == -signal.SIGKILL
    assert [each.name for each in tmp_path.iterdir()] == ["state"]
    trained, real = [], Halving._accuracy
    monkeypatch.setattr(Halving, "_accuracy", lambda self, *given: trained.append(given) or real(self, *given))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        agents = [NetworkAgent(search([4, 2], [5, 15]), one_shot, None, at, Training(TRAIN)) for at in (path, None)]
        masks = [agent.choose(TARGET, 0) for agent in agents]
    finally:
        torch.set_num_threads(before)
    total = sum(len(rung["candidates"]) for rung in agents[1].facts["halving"])
    assert len(trained) == (total - 3) + total
    assert agents[0].facts == agents[1].facts
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"candidates": [8]}, r"candidates \[8\] and minibatches \[50, 200\]; expected as many numbers in one as"),
        ({"candidates": [8, 8]}, r"candidates is \[8, 8\]; expected falling numbers of 2 or more, such as \[8, 3\]"),
        ({"candidates": [3, 1]}, r"candidates is \[3, 1\]; expected falling numbers"),
        ({"candidates": [8, 3], "minibatches": [50, 50]}, r"minibatches is \[50, 50\]; expected rising numbers"),
        ({"candidates": [8, 3], "minibatches": [0, 50]}, "minibatches is 0; expected a number from 1"),
    ],
)
def test_rungs_that_are_none_are_refused(given, sentence):
    with pytest.raises(UserError, match=sentence):
        HalvingSettings(**given)
