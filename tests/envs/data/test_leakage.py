"""Images that splits share are found, exactly or nearly, whatever holds them; images that are merely alike are not."""

import re
import warnings

import numpy as np
import pytest
import torch
from keepdrop.envs.data.datasets import from_datasets
from keepdrop.envs.data.images import ArrayImages, LabelledData
from keepdrop.envs.data.leakage import Thumbnails, copies
from keepdrop.envs.data.sources import digits
from keepdrop.envs.data.splits import split
from keepdrop.errors import Notice, UserError
from torch.utils.data import TensorDataset


def scenes(count, seed):
    """Smooth random images (count, 3, 24, 24) uint8."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(coarse, size=24, mode="bilinear")).to(torch.uint8)


def noisy(images, amount=6):
    noise = amount * torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    return (images.float() + noise).clamp(0, 255).to(torch.uint8)


def held(images, kind="array"):
    labels = torch.arange(len(images)) % 3
    if kind == "array":
        return ArrayImages(images, labels, [0.5] * 3, [0.5] * 3, 3)
    return TensorDataset(images.float() / 255, labels)


def found(ours, theirs):
    return copies(*(Thumbnails.of(held(each)) for each in (ours, theirs)))


def test_exact_and_near_copies_are_counted():
    train, test = scenes(400, 0), scenes(200, 1)
    none = found(train, test)
    assert (none.n_compared, none.exact, none.near, none.first) == (200, 0, 0, None)
    test[40:60], test[100:150] = train[7:27], noisy(train[300:350])
    mixed = found(train, test)
    assert (mixed.exact, mixed.first) == (20, 40) and mixed.near > 40


def test_the_digits_and_blank_images_are_no_copies():
    data = digits()
    some = copies(Thumbnails.of(data.train), Thumbnails.of(data.test))
    assert (some.n_compared, some.exact, some.near) == (449, 0, 0)
    assert found(torch.zeros(9, 3, 8, 8), torch.zeros(9, 3, 8, 8)).n_compared == 0


def test_planes_of_a_board_are_told_apart():
    """The same squares taken by other pieces: no copy, though all planes together look the same."""
    taken = torch.from_numpy(np.random.default_rng(0).random((60, 1, 8, 8)) < 0.3).float()
    boards = torch.cat([taken, torch.zeros(60, 2, 8, 8)], 1)
    assert found(boards, boards.roll(1, 1)).exact == 0 and found(boards, boards).exact == 60


@pytest.mark.parametrize("kind", ["array", "dataset"])
def test_a_test_set_of_training_images_is_refused_and_a_few_are_counted(kind):
    train, test = scenes(120, 0), scenes(60, 1)
    same = from_datasets(held(train, kind), held(train[:50], kind))
    sentence = "50 of 50 test images are training images too (first: 0); the splits overlap, so no accuracy on them"
    with pytest.raises(UserError, match=re.escape(sentence)):
        split(same, reward_from="train", reward_size=20, seed=0)
    test[5:8] = train[60:63]
    few = from_datasets(held(train, kind), held(test, kind))
    sentence = "Of 60 test images some are training images too: 3 exactly (first: 5); what is measured on them may be"
    with pytest.warns(Notice, match=re.escape(sentence)):
        split(few, reward_from="test", reward_size=20, seed=0)


def test_splits_of_one_source_are_compared_too():
    train = scenes(60, 0)
    doubled = LabelledData(held(torch.cat([train, train])), held(scenes(30, 1)))
    with pytest.warns(Notice, match=r"images of the reward split some are images of the fit split too: \d+ exactly"):
        split(doubled, reward_from="train", reward_size=40, seed=0)


@pytest.mark.parametrize("sides", [(50,), (6, 9, 9)])
def test_signals_and_volumes_are_compared_exactly_only(sides):
    pixels = torch.randn(40, 2, *sides, generator=torch.Generator().manual_seed(0))
    ours, theirs = (ArrayImages(each, torch.arange(40), [0.0] * 2, [1.0] * 2, 40) for each in (pixels, pixels * 1.01))
    assert copies(Thumbnails.of(ours), Thumbnails.of(theirs)).near == 0
    with pytest.raises(UserError, match="40 of 40 test images are training images too"):
        split(LabelledData(ours, ours), reward_from="test", reward_size=9, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split(LabelledData(ours, theirs), reward_from="test", reward_size=9, seed=0)
