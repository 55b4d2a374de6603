"""What lands in TensorBoard, and that docs/metrics.md explains all of it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from keepdrop.experiments.runs.tracking import CELL, DROPPED, KEPT, NOTHING, Tracker, kept_image
from keepdrop.rewards.budget import Budget
from keepdrop.rewards.outcome import Outcome
from keepdrop.rewards.priced import Priced
from keepdrop.rewards.try_and_learn import TryAndLearn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PAGE = Path(__file__).parents[3] / "docs/metrics.md"
OUTCOME = Outcome(0.9, 0.8, 16, 8, 100, 50, 10, 5)


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"histograms": 0, "images": 0})
    found.Reload()
    return found


@pytest.fixture(scope="module")
def logged(finished):
    return events(finished / "tensorboard")


def explained():
    return set(re.findall(r"`([a-z_]+/[\w/]*\w)`", PAGE.read_text()))


def test_every_tag_is_explained(logged):
    tags = [tag for kind in ("scalars", "histograms", "images") for tag in logged.Tags()[kind]]
    general = {re.sub(r"^agent/conv\d/", "agent/LAYER/", tag) for tag in tags}
    assert general <= explained() and len(general) > 25


@pytest.mark.parametrize("reward", [TryAndLearn(0.02), Budget(0.4, drop_bound=0.02), Priced(0.1)])
def test_terms_of_every_reward_are_explained(reward):
    assert {f"agent/LAYER/info/{name}" for name in reward(OUTCOME).terms} <= explained()


def test_page_explains_nothing_that_is_never_logged(logged):
    tags = {
        re.sub(r"^agent/conv\d/", "agent/LAYER/", t) for kind in logged.Tags().values() if kind for t in as_list(kind)
    }
    rewards = (Budget(0.4, drop_bound=0.02), Priced(0.1))
    terms = {f"agent/LAYER/info/{name}" for reward in rewards for name in reward(OUTCOME).terms}
    assert {tag for tag in explained() if not tag.startswith("tensorboard/")} <= tags | terms


def as_list(tags):
    return tags if isinstance(tags, list) else []


def test_keep_probabilities_of_every_update(logged):
    points = logged.Histograms("agent/conv1/keep_probability")
    assert [point.step for point in points] == [1, 2]
    assert all(point.histogram_value.num == 16 and point.histogram_value.min >= 0 for point in points)


def test_final_metrics_and_settings(finished, logged):
    metrics = json.loads((finished / "metrics.json").read_text())
    (point,) = logged.Scalars("final/finetuned_accuracy")
    assert point.value == pytest.approx(metrics["finetuned_accuracy"])
    data = logged.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"drop_bound" in data and b"agent.updates" in data and b"policy._target_" in data


def test_kept_image_has_a_cell_a_filter():
    image = kept_image([[True, False], [False]])
    assert image.shape == (2 * CELL, 2 * CELL, 3) and image.dtype == np.uint8
    corners = [[tuple(int(v) for v in image[r * CELL, c * CELL]) for c in range(2)] for r in range(2)]
    assert corners == [[KEPT, DROPPED], [DROPPED, NOTHING]]


def test_histogram_is_what_was_given(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.histogram("p", torch.tensor([0.0, 0.5, 1.0], requires_grad=True), 3)
    tracker.close()
    (point,) = events(tmp_path).Histograms("p")
    assert point.step == 3 and point.histogram_value.sum == pytest.approx(1.5)
