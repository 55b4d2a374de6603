"""What a run from Python was asked to do: runs that earlier versions began go on, other ones are refused by name."""

import dataclasses
import json

import pytest
from keepdrop.envs.task import EvaluationSettings
from keepdrop.errors import UserError
from keepdrop.experiments.api.job_folder import ASKED, _check_asked, described
from keepdrop.experiments.api.settings import Settings
from keepdrop.experiments.runs.folder import RunFolder
from keepdrop.experiments.training.train_settings import TrainSettings

LATER = ("top_lr", "auxiliary", "ema")  # fields of TrainSettings that version 0.1.0 does not have


def begun(folder, asked, lr):
    """A folder as an earlier version wrote it; `lr` was a number then."""
    text = json.loads(json.dumps(described(asked)))
    text["recover"] = {name: value for name, value in text["recover"].items() if name not in LATER} | {"lr": lr}
    del text["settings"]["loss"]  # as if it had come later, too
    (folder / ASKED).write_text(json.dumps(text))
    return RunFolder(folder)


@pytest.mark.parametrize(("given", "lr"), [({"lr": 0.02}, 0.02), ({}, 0.05)])
def test_a_run_that_an_earlier_version_began_goes_on(tmp_path, given, lr):
    asked = {"settings": Settings(), "recover": TrainSettings(epochs=1, **given)}
    folder = begun(tmp_path, asked, lr)
    _check_asked(folder, asked)
    changes = {
        "recover.lr": {"recover": TrainSettings(epochs=1, lr=0.03)},
        "recover.epochs": {"recover": TrainSettings(epochs=2, **given)},
        "recover.auxiliary": {"recover": TrainSettings(epochs=1, auxiliary=0.1, **given)},
        "settings.loss": {"settings": Settings(loss=max)},
        "settings.evaluation.target": {"settings": Settings(evaluation=EvaluationSettings(target="current"))},
        "recover": {"recover": None},
    }
    for name, change in changes.items():
        with pytest.raises(UserError, match=f"holds another run: its {name} differs; give a new folder"):
            _check_asked(folder, asked | change)


def test_what_a_run_of_this_version_was_asked_is_compared_in_full(tmp_path):
    asked = {"recover": TrainSettings(epochs=1)}
    _check_asked(RunFolder(tmp_path), asked)
    written = json.loads((tmp_path / ASKED).read_text())
    compared = {each.name for each in dataclasses.fields(TrainSettings)} - {"devices"}  # others have more
    assert set(written["recover"]) == {"", *compared}
    _check_asked(RunFolder(tmp_path), {"recover": TrainSettings(epochs=1, devices=2)})
    with pytest.raises(UserError, match=r"its recover\.lr differs"):
        _check_asked(RunFolder(tmp_path), {"recover": TrainSettings(epochs=1, lr=0.05)})
