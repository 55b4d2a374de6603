"""Batches on the device, drawn once for an epoch, and sums that nobody waits for: the bits of the plain loop."""

import pytest
import torch
from keepdrop.envs.data.datasets import DatasetImages
from keepdrop.envs.data.metrics import Within
from keepdrop.envs.data.objective import Objective, with_objective
from keepdrop.envs.data.sources import ArrayImages, digits
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import hash_state
from keepdrop.errors import UserError
from keepdrop.experiments.training import feed, loop
from keepdrop.experiments.training.augment import RandomCropFlip, drawn_apart
from keepdrop.experiments.training.feed import Feed
from keepdrop.experiments.training.loop import TrainSettings, fit_network
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return digits().train.select(torch.arange(130))


@pytest.fixture
def ahead(monkeypatch):
    """As on a GPU, without graphs."""

    def on():
        monkeypatch.setattr(loop, "runs_ahead", lambda device: True)
        monkeypatch.setattr(loop, "capture_of", lambda device: None)
        monkeypatch.setattr(feed, "free_bytes", lambda device: 2**40)
        monkeypatch.setattr(loop, "PATIENCE", 3)

    return on


class Noisy(RandomCropFlip):
    """A subclass with an idea of its own."""

    def __call__(self, images, generator):
        return super().__call__(images, generator) + torch.rand(len(images), 1, 1, 1, generator=generator)


def network(answers=10):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(small_cnn(n_classes=answers), nn.Dropout(0.2))


def trained(data, augment=None, answers=10, **settings):
    model = network(answers)
    settings = TrainSettings(epochs=2.5, batch_size=32, lr=0.02, **settings)
    return model, fit_network(model, data, settings, seed=5, augment=augment, teacher=network(answers))


def numbers(data):
    images, _ = data.batch(torch.arange(len(data)))
    targets = images.mean((1, 2, 3))[:, None]
    return with_objective(ArrayImages(images, targets, [0.0], [1.0], 0), Objective(Within(0.5)))


@pytest.mark.parametrize("augment", [None, RandomCropFlip(1), RandomCropFlip(0), RandomCropFlip(1, False), Noisy(1)])
@pytest.mark.parametrize("kind", ["arrays", "dataset", "numbers"])
def test_what_runs_ahead_trains_bit_for_bit_alike(data, ahead, augment, kind):
    if kind == "dataset":
        items = [data.batch(torch.tensor([index])) for index in range(len(data))]
        images = DatasetImages([(image[0], int(label)) for image, label in items], 10)
    else:
        images = numbers(data) if kind == "numbers" else data
    options = {"answers": 1} if kind == "numbers" else {"distill_weight": 0.5, "ema": 0.9}
    plain, expected = trained(images, augment, **options)
    ahead()
    model, result = trained(images, augment, **options)
    assert hash_state(model) == hash_state(plain) and result == expected


def test_images_stay_where_they_fit_and_nobody_else_is_asked(data, ahead, monkeypatch):
    ahead()
    own = Noisy(1)
    assert drawn_apart(own) is None and drawn_apart(None) is None
    assert Feed(data, RandomCropFlip(1), CPU, stay=True).resident is not None
    assert Feed(data, RandomCropFlip(1), CPU).resident is None
    assert Feed(data, own, CPU, stay=True).resident is None
    monkeypatch.setattr(feed, "free_bytes", lambda device: 3 * data.n_bytes)
    assert Feed(data, None, CPU, stay=True).resident is not None
    monkeypatch.setattr(feed, "free_bytes", lambda device: 3 * data.n_bytes - 1)
    assert Feed(data, None, CPU, stay=True).resident is None
    assert data.n_bytes == 130 * (64 * data._images.element_size() + 8)


def test_a_diverged_training_is_named_late_and_alike(data, ahead):
    """The metric never meets what is no number: it would raise an error of its own."""
    images = numbers(data)
    images.images._images *= 1e30
    for late in (False, True):
        ahead() if late else None
        with pytest.raises(UserError, match=r"Training diverged in epoch 1: the loss is (nan|inf); lower lr \(it is 1"):
            fit_network(network(1), images, TrainSettings(epochs=1, batch_size=8, lr=1000.0, warmup=0.0), seed=0)
