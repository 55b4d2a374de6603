"""Recovery between layers: one rate is chosen and remembered, a tenth is tried once, a resumed run takes the same."""

import copy
import shutil

import pytest
from digits_task import QUICK, make_task
from keepdrop.errors import UserError
from keepdrop.experiments.pruning import recover
from keepdrop.experiments.pruning.recover import USED, Recover, RecoverySettings
from keepdrop.experiments.runs.folder import read_json
from keepdrop.experiments.training.loop import DivergedError
from keepdrop.experiments.training.train_settings import TrainSettings


@pytest.fixture(scope="module")
def task():
    return make_task(QUICK)


def scripted(monkeypatch, borne, helps=lambda lr: True):
    """Trials that say `borne`, trainings that diverge except at rates for which `helps`; what was done, in order."""
    done = []

    def choose(*_arguments, **_shared):
        done.append("trial")
        return borne

    def train(_model, _data, settings, **_shared):
        done.append(settings.lr)
        if not helps(settings.lr):
            raise DivergedError("too high")

    monkeypatch.setattr(recover, "bearable_rate", choose)
    monkeypatch.setattr(recover, "fit_network", train)
    return done


def recovered(task, folder, name, lr=None):
    """Whether the recovery after a layer was kept."""
    working = folder / name
    working.mkdir(parents=True)
    return Recover(RecoverySettings(0, TrainSettings(epochs=1, lr=lr)))(task, 0, working) is not task.model


def test_the_rate_is_chosen_once_and_taken_again_by_whoever_resumes(monkeypatch, tmp_path, task):
    done = scripted(monkeypatch, 0.02)
    assert recovered(task, tmp_path, "00-a") and recovered(task, tmp_path, "02-c") and recovered(task, tmp_path, "03-d")
    assert done == ["trial", 0.02, 0.02, 0.02]
    assert read_json(tmp_path / "03-d" / USED) == {"lr": 0.02}
    shutil.copytree(tmp_path / "00-a", tmp_path / "04-e.partial")  # of an interrupted layer
    (tmp_path / "04-e.partial" / USED).write_text('{"lr": 7}')
    assert recovered(task, tmp_path, "04-e") and done[-1] == 0.02


def test_a_recovery_that_fails_is_tried_at_a_tenth_which_is_remembered(monkeypatch, tmp_path, task):
    done = scripted(monkeypatch, 0.02, lambda lr: lr < 0.01)
    assert recovered(task, tmp_path, "00-a") and recovered(task, tmp_path, "01-b")
    assert done == ["trial", 0.02, 0.002, 0.002]


def test_a_rate_that_fails_is_forgotten(monkeypatch, tmp_path, task):
    done = scripted(monkeypatch, 0.02, lambda lr: False)
    assert not recovered(task, tmp_path, "00-a") and not recovered(task, tmp_path, "01-b")
    assert done == ["trial", 0.02, 0.002] * 2 and read_json(tmp_path / "01-b" / USED) == {"lr": None}


def test_a_rate_that_was_given_is_tried_alone(monkeypatch, tmp_path, task):
    done = scripted(monkeypatch, 0.02, lambda lr: False)
    assert not recovered(task, tmp_path, "00-a", lr=0.3)
    assert done == [0.3] and not list((tmp_path / "00-a").iterdir())


def test_what_makes_it_worse_is_dropped(monkeypatch, tmp_path, task):
    done = scripted(monkeypatch, 0.02)
    accuracies = iter([0.9, 0.8, 0.95])
    monkeypatch.setattr(recover, "_accuracy", lambda *_: next(accuracies))
    assert recovered(task, tmp_path, "00-a") and done == ["trial", 0.02, 0.002]


@pytest.mark.parametrize("text", ['{"lr": "high"}', '{"lr": -1}', "{", '{"lr": 1e999}'])
def test_a_damaged_rate_is_refused(monkeypatch, tmp_path, task, text):
    scripted(monkeypatch, 0.02)
    recovered(task, tmp_path, "00-a")
    (tmp_path / "00-a" / USED).write_text(text)
    with pytest.raises(UserError, match=f"{USED}.* is damaged"):
        recovered(task, tmp_path, "01-b")


def test_the_network_that_is_recovered_stays_as_it_is(tmp_path, task):
    before = copy.deepcopy(task.model.state_dict())
    recovered(task, tmp_path, "00-a")
    assert all((value == before[name]).all() for name, value in task.model.state_dict().items())
