"""Composed scenes: exact maps, the same for the same arguments, digits that are not shared, refusals."""

import re

import numpy as np
import pytest
import torch
from keepdrop.envs.data.scenes import composed_scenes
from keepdrop.errors import UserError


def test_scenes_have_a_class_per_pixel_and_repeat():
    data = composed_scenes(n_train=40, n_test=12, size=32)
    images, maps = data.train.batch(torch.arange(40))
    assert images.shape == (40, 3, 32, 32) and maps.shape == (40, 32, 32) and maps.dtype == torch.int64
    assert len(data.test) == 12 and set(maps.unique().tolist()) == set(range(11))
    assert 0.02 < (maps > 0).float().mean() < 0.3
    again = composed_scenes(n_train=40, n_test=12, size=32).train.batch(torch.arange(40))
    assert torch.equal(again[0], images) and torch.equal(again[1], maps)
    assert not torch.equal(composed_scenes(n_train=40, n_test=12, size=32, seed=1).train.labels, data.train.labels)


def test_what_the_map_calls_a_digit_is_what_was_drawn(tmp_path):
    """On black photos everything but background and bars stands out by its colour, and the map has nothing else."""
    black = {f"x_{part}": np.zeros((3, 32, 32, 3), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "black.npz", **black, y_train=np.zeros(3, np.int64), y_test=np.zeros(3, np.int64))
    data = composed_scenes(n_train=30, n_test=2, size=32, photos=tmp_path / "black.npz")
    drawn = data.train._images.amax(1) > 120
    digit = data.train.labels > 0
    assert (drawn | ~digit).all(), "a digit's pixel is as dark as the background"
    without_bars = (drawn & ~digit).flatten(1).sum(1) == 0
    assert 5 < without_bars.sum() < 30


def test_photos_are_those_of_the_part(tmp_path):
    parts = {"train": (255, 0, 0), "test": (0, 0, 255)}
    arrays = {f"x_{part}": np.full((2, 8, 8, 3), colour, np.uint8) for part, colour in parts.items()}
    np.savez(tmp_path / "p.npz", **arrays, y_train=np.zeros(2, np.int64), y_test=np.zeros(2, np.int64))
    data = composed_scenes(n_train=6, n_test=6, size=32, photos=tmp_path / "p.npz")
    for source, channel in ((data.train, 0), (data.test, 2)):
        means = source._images.float().mean((0, 2, 3))
        assert means.argmax() == channel and means[channel] > 100


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"n_test": 0}, "at least one scene of each kind, got n_train=4000, n_test=0"),
        ({"size": 20}, "a size of 32 or more that is a multiple of 8, got size=20"),
        ({"photos": "none.npz"}, "'none.npz' does not exist"),
    ],
)
def test_impossible_scenes_are_refused(arguments, text):
    with pytest.raises(UserError, match=re.escape(text)):
        composed_scenes(**arguments)


def test_grey_photos_are_refused(tmp_path):
    grey = np.zeros((2, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "g.npz", x_train=grey, x_test=grey, y_train=np.zeros(2, int), y_test=np.zeros(2, int))
    with pytest.raises(UserError, match="x_train are no photos"):
        composed_scenes(photos=tmp_path / "g.npz")
