"""What is kept as it is stays as it is: no schedule cuts, refits or trains a layer of which nothing is removed."""

import copy
import dataclasses
import shutil

import pytest
import torch
from digits_task import QUICK, make_task
from keepdrop.envs import task as tasks
from keepdrop.envs.evaluation.mask_evaluator import correct_flags
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.experiments.pruning.decide import Decision
from keepdrop.experiments.pruning.network_decide import NetworkDecision
from keepdrop.experiments.pruning.network_schedule import NetworkSchedule
from keepdrop.experiments.pruning.schedule import Schedule
from keepdrop.experiments.runs.folder import RunFolder
from safetensors.torch import load_file


class Unwatched:
    def layer_begins(self, *_arguments):
        pass

    def network_ends(self, *_arguments):
        pass

    def layer_ends(self, *_arguments):
        pass


def away_from_the_dense_network(task, _seed, _working):
    """A recovery after which conv2 speaks in other units than the dense network's: the answers are the same."""
    model = copy.deepcopy(task.model)
    with torch.no_grad():
        model.bn2.weight.mul_(4)
        model.bn2.bias.mul_(4)
        model.conv3.weight.div_(4)
    return model


def drop_one_then_nothing(layer, _working, _seed):
    keep = torch.ones(layer.n_filters, dtype=torch.bool)
    if layer.name == "conv1":
        keep[3] = False
    if layer.name == "conv3":
        keep[1:] = False  # breaks every bound, and leaves no alternative
    return Decision(keep, "agent")


def weights(folder, stage):
    return load_file(folder / stage / "network.safetensors")


@pytest.mark.parametrize("target", ["trained", "dense", "current"])
def test_a_layer_that_keeps_everything_leaves_the_network_bit_for_bit(tmp_path, target):
    task = make_task(dataclasses.replace(QUICK, target=target))
    schedule = Schedule(drop_one_then_nothing, None, 0.05, away_from_the_dense_network)
    left, _, records = schedule.run(task, RunFolder(tmp_path), Unwatched())
    first, second, third = records
    assert [(each.n_kept, each.decided_by) for each in records] == [(7, "agent"), (10, "agent"), (12, "nothing fits")]
    assert first.within_bound and second.within_bound and third.within_bound
    for record in (second, third):
        assert record.pruned_accuracy == record.recovered_accuracy == first.recovered_accuracy == left.accuracy
        assert record.facts["compensated"] == []
    stages = [weights(tmp_path, f"layers/0{i}-conv{i + 1}") for i in range(3)]
    for later in stages[1:]:
        assert all(torch.equal(value, later[name]) for name, value in stages[0].items())


def test_a_network_that_keeps_everything_is_neither_repaired_nor_trained(tmp_path):
    task = make_task(QUICK)

    def keep_all(one_shot, _working, _state, _seed):
        return NetworkDecision(one_shot.named(torch.ones(one_shot.n_filters, dtype=torch.bool)), "l1")

    schedule = NetworkSchedule(keep_all, ReconstructionSettings(images=40), 0.0, 0, away_from_the_dense_network)
    left, _, records = schedule.run(task, RunFolder(tmp_path), Unwatched())
    assert all(torch.equal(value, left.model.state_dict()[name]) for name, value in task.model.state_dict().items())
    assert {each.pruned_accuracy for each in records} == {task.accuracy} and all(each.within_bound for each in records)


def drop_one(layer, _working, _seed):
    return Decision(torch.arange(layer.n_filters) != 4, "agent")


@pytest.mark.parametrize(("target", "lost"), [("trained", False), ("current", False), ("dense", True)])
def test_once_recovery_has_trained_compensation_leaves_the_dense_network_behind(tmp_path, target, lost):
    task = make_task(dataclasses.replace(QUICK, target=target))
    schedule, folder = Schedule(drop_one, None, None, away_from_the_dense_network), RunFolder(tmp_path)
    _, _, records = schedule.run(task, folder, Unwatched())
    assert all(each.facts["recovered"] for each in records)
    assert (records[1].pruned_accuracy < records[0].recovered_accuracy - 0.1) == lost
    # A resumed run decides the same: what recovery did is on disk.
    shutil.rmtree(tmp_path / "layers/02-conv3")
    _, _, again = schedule.run(task, folder, Unwatched())
    assert again[2].pruned_accuracy == records[2].pruned_accuracy


@pytest.mark.parametrize("recover", [None, away_from_the_dense_network])
def test_what_is_left_is_measured_once(tmp_path, recover, monkeypatch):
    task, measured = make_task(QUICK), []
    monkeypatch.setattr(tasks, "correct_flags", lambda *a, **k: measured.append(1) or correct_flags(*a, **k))
    left, _, records = Schedule(drop_one_then_nothing, None, 0.05, recover).run(task, RunFolder(tmp_path), Unwatched())
    assert [bool(all(each.keep)) for each in records] == [False, True, True]
    assert len(measured) == (1 if recover is None else 2)  # after the one cut, and once it has recovered
    points = correct_flags(left.model, *task.reward_images)
    assert torch.equal(left.correct, points) and left.accuracy == records[-1].recovered_accuracy


def test_without_a_recovery_drift_is_corrected_from_the_dense_network(tmp_path):
    accuracies = {}
    for target in ("trained", "dense"):
        task = make_task(dataclasses.replace(QUICK, target=target))
        left, _, records = Schedule(drop_one, None, None).run(task, RunFolder(tmp_path / target), Unwatched())
        assert left.trained is task and not any(each.facts["recovered"] for each in records)
        accuracies[target] = [each.pruned_accuracy for each in records]
    assert accuracies["trained"] == accuracies["dense"]
