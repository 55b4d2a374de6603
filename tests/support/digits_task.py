"""A small network trained on the digits and its splits, trained once a test process."""

from functools import cache

import torch
from keepdrop.envs.data.sources import digits
from keepdrop.envs.data.splits import split
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.task import EvaluationSettings, PruningTask
from keepdrop.experiments.training.loop import TrainSettings, fit_network

QUICK = EvaluationSettings(compensation_images=150, statistics_images=60)
MASKED = EvaluationSettings(compensate=False, statistics_images=60)


@cache
def trained():
    """A trained network in training mode, and its splits; tests must leave both alone."""
    splits = split(digits(), reward_from="train", reward_size=250, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_cnn(widths=(8, 10, 12))
    fit_network(model, splits.fit, TrainSettings(epochs=6, batch_size=64), seed=0)
    model.zero_grad()
    return model, splits


def make_task(settings=MASKED, **arguments):
    """A fresh task on the trained network."""
    return PruningTask(*trained(), settings=settings, **arguments)
