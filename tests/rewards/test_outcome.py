"""The outcome and reward records check themselves and derive fractions."""

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest
from keepdrop.rewards import Outcome, Reward, UserError

GOOD: dict[str, Any] = {
    "base_accuracy": 0.9,
    "pruned_accuracy": 0.88,
    "n_filters": 16,
    "n_kept": 4,
    "base_macs": 1000,
    "pruned_macs": 250,
    "base_params": 200,
    "pruned_params": 150,
}


def test_derived_fractions() -> None:
    outcome = Outcome(**GOOD, base_seconds=2.0, pruned_seconds=3.0)
    assert outcome.accuracy_drop == pytest.approx(0.02)
    assert outcome.kept_fraction == 0.25
    assert outcome.macs_fraction == 0.25
    assert outcome.params_fraction == 0.75
    assert outcome.seconds_fraction == 1.5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"base_accuracy": 91.7}, r"base_accuracy is 91.7, but accuracy is a fraction .* divide by 100"),
        ({"pruned_accuracy": -0.1}, "pruned_accuracy is -0.1, but accuracy is a fraction"),
        ({"pruned_accuracy": math.nan}, "pruned_accuracy is nan"),
        ({"n_filters": 0, "n_kept": 0}, "n_filters is 0, but it must be at least 1"),
        ({"n_kept": 17}, r"n_kept is 17, but it must lie between 0 and n_filters \(16\)"),
        ({"n_kept": -1}, "n_kept is -1"),
        ({"pruned_macs": 1001}, r"pruned_macs is 1001, but it must lie between 0 and base_macs \(1000\)"),
        ({"base_params": 0, "pruned_params": 0}, "base_params is 0"),
        ({"base_seconds": 1.0}, "given together or not at all"),
        ({"base_seconds": 1.0, "pruned_seconds": 0.0}, "pruned_seconds is 0.0, but a latency"),
    ],
)
def test_impossible_outcomes_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Outcome(**(GOOD | change))


def test_no_latency_no_fraction() -> None:
    with pytest.raises(UserError, match="no measured latency; give a profile of the device, or aim at macs or params"):
        _ = Outcome(**GOOD).seconds_fraction


def test_outcome_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Outcome(**GOOD).n_kept = 3  # type: ignore[misc]


def test_reward_terms_cannot_be_changed_from_outside() -> None:
    terms = {"psi": 1.0}
    reward = Reward(0.5, terms)
    terms["psi"] = 2.0
    assert reward.terms["psi"] == 1.0
    with pytest.raises(TypeError):
        reward.terms["psi"] = 3.0  # type: ignore[index]


def test_reward_survives_copy_and_pickle() -> None:
    reward = Reward(0.5, {"psi": 1.0})
    assert pickle.loads(pickle.dumps(reward)) == copy.deepcopy(reward) == reward


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_reward_is_finite(value: float) -> None:
    with pytest.raises(ValueError, match="a reward is finite"):
        Reward(value, {})
