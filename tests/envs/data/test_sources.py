"""Data sources, splits and augmentation: what they give, what they refuse and with which sentence."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from keepdrop.envs.data.arrays import from_arrays
from keepdrop.envs.data.sources import (
    ArrayImages,
    DatasetImages,
    LabelledData,
    digits,
    from_datasets,
    npz,
    torchvision_dataset,
)
from keepdrop.envs.data.splits import split, splits_at
from keepdrop.envs.networks.built_in import cifar_resnet
from keepdrop.envs.networks.checkpoint import load_checkpoint
from keepdrop.errors import Notice, UserError
from keepdrop.experiments.training.augment import RandomCropFlip

ROOT = Path(__file__).parents[3].parent
CIFAR = ROOT / "data" / "cifar10.npz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def arrays(n_train=12, n_test=6, kind="uint8"):
    rng = np.random.default_rng(0)
    given = {}
    for part, count in (("train", n_train), ("test", n_test)):
        pixels = rng.integers(0, 256, (count, 5, 6, 3), dtype=np.uint8)
        given[f"x_{part}"] = pixels if kind == "uint8" else pixels.transpose(0, 3, 1, 2).astype(kind) / 255
        given[f"y_{part}"] = np.arange(count) % 3
    return given


def array_images(n_images=10, n_classes=3):
    images = torch.randn(n_images, 3, 4, 4, generator=torch.Generator().manual_seed(n_images))
    return ArrayImages(images, torch.arange(n_images) % n_classes, (0,) * 3, (1,) * 3, n_classes)


class Pairs:
    """A map-style dataset without targets or classes."""

    def __init__(self, images, labels):
        self.pairs = list(zip(images, labels, strict=True))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


def test_digits_are_normalised_shuffled_and_complete():
    data = digits(seed=0, test_fraction=0.25)
    assert (len(data.train), len(data.test)) == (1348, 449)
    assert data.train.image_shape == (1, 8, 8) and data.train.n_classes == 10
    images, labels = data.train.batch(torch.arange(1348))
    assert abs(float(images.mean())) < 0.02 and abs(float(images.std()) - 1) < 0.02
    assert (labels[1:] < labels[:-1]).any() and labels.bincount().min() > 100
    assert digits(0).train.digest() == data.train.digest() != digits(1).train.digest()
    with pytest.raises(UserError, match=re.escape("test_fraction must lie between 0 and 1, got 25")):
        digits(test_fraction=25)


def test_digits_are_those_of_scikit_learn():
    """Digests of version 0.1.0, which had them from sklearn.datasets.load_digits."""
    data = digits()
    assert data.train.digest() == "aaf1659c3c1b7d1ec8b6c85957985ffc38e87a06c015ddfe41f796e276cbfbd3"
    assert data.test.digest() == "167ff0c031808da50a9dfd81097101c30b5cb598a5c71bfa196c89474d67f427"


@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", "float16"])
def test_npz_of_bytes_and_of_floats_gives_equal_normalised_batches(tmp_path, kind):
    given = arrays(kind=kind)
    np.savez(tmp_path / "data.npz", **given)
    data = npz(tmp_path / "data.npz", MEAN, STD)
    images, labels = data.train.batch(torch.tensor([4, 1]))
    pixels = arrays()["x_train"][[4, 1]].transpose(0, 3, 1, 2) / 255
    expected = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(images.numpy(), expected, atol=5e-3 if kind == "float16" else 1e-5)
    assert labels.tolist() == [1, 1] and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert (data.test.image_shape, data.test.n_classes, len(data.test)) == ((3, 5, 6), 3, 6)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_npz_default_normalisation_is_that_of_the_training_images(kind):
    images, _ = from_arrays(arrays(n_train=50, kind=kind)).train.batch(torch.arange(50))
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def with_nan(array):
    array = array.transpose(0, 3, 1, 2).astype(np.float32)
    array[3, 0, 0, 0] = np.nan
    return array


BAD_ARRAYS = {
    "flat": ("x_train", lambda a: a.reshape(12, -1), "x_train has shape (12, 90); expected uint8 (n, height, width"),
    "nchw_bytes": (
        "x_train",
        lambda a: a.transpose(0, 3, 1, 2),
        "x_train is uint8 of shape (12, 3, 5, 6), which reads as 6 channels of 3x5 pixels; expected uint8 (n, height",
    ),
    "nhwc_floats": (
        "x_test",
        lambda a: a.astype(np.float32),
        "x_test is float32 of shape (6, 5, 6, 3), which reads as 5 channels of 6x3 pixels",
    ),
    "integers": ("x_train", lambda a: a.astype(np.int64), "x_train has type int64; expected uint8 (n, height, width"),
    "nan": ("x_train", with_nan, "x_train has NaN or infinite values in 1 of 12 images; remove them."),
    "no_images": ("x_test", lambda a: a[:0], "x_test has shape (0, 5, 6, 3); expected uint8"),
    "float_labels": ("y_train", lambda a: a / 2, "y_train and y_test must have one type, got float64 and int64."),
    "few_labels": ("y_train", lambda a: a[:-1], "y_train has shape (11,); expected (12,), one label per image."),
    "one_hot": ("y_test", lambda a: np.eye(3, dtype=int)[a], "y_test has shape (6, 3); expected (6,)"),
    "from_one": ("y_train", lambda a: a + 1, "y_train has labels 1..3; expected 0..2 for 3 classes, numbered from 0"),
    "negative": ("y_test", lambda a: a - 1, "y_test has labels -1..1; expected 0..2 for 3 classes"),
    "new_class": ("y_test", lambda a: a + 1, "y_test has labels 1..3; expected 0..2 for 3 classes"),
    "other_size": (
        "x_test",
        lambda a: a[:, :4],
        "Train and test images differ in image_shape: (3, 5, 6) against (3, 4",
    ),
    "other_type": (
        "x_test",
        lambda a: a.transpose(0, 3, 1, 2) / 255,
        "x_train and x_test must have one type, got torch.uint8 and torch.float32.",
    ),
    "volumes_of_bytes": ("x_train", lambda a: a[:, None, None], "x_train has shape (12, 1, 1, 5, 6, 3); expected"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_npz_refuses_bad_arrays(tmp_path, name):
    key, spoil, text = BAD_ARRAYS[name]
    given = arrays()
    given[key] = spoil(given[key])
    np.savez(tmp_path / "data.npz", **given)
    with pytest.raises(UserError, match=re.escape(text)):
        npz(tmp_path / "data.npz", MEAN, STD)


def test_npz_refuses_missing_truncated_incomplete_and_pickled_files(tmp_path):
    path = tmp_path / "data.npz"
    with pytest.raises(UserError, match=re.escape(f"Data file '{path}' does not exist; check the path.")):
        npz(path)
    np.savez_compressed(path, **arrays())
    content = path.read_bytes()
    damaged = [content[: int(kept * len(content))] for kept in (0, 0.1, 0.5, 0.99)]
    damaged += [b"hello", content[:300] + bytes(200) + content[500:]]
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"is truncated or not an .npz file of arrays; write it again\."):
            npz(path)
    np.savez(path, x_train=arrays()["x_train"], labels=np.zeros(3))
    with pytest.raises(UserError, match=re.escape("lacks y_train, x_test, y_test (it holds x_train, labels)")):
        npz(path)
    np.savez(path, **(arrays() | {"y_test": np.array([{}, 1], dtype=object)}))
    with pytest.raises(UserError, match=r"holds pickled objects, which are refused; save plain arrays\."):
        npz(path)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.2,)), ((0.5,) * 3, (0.2, 0.0, 0.2))])
def test_normalisation_must_fit_the_channels(mean, std):
    with pytest.raises(UserError, match="Normalisation needs one mean and one positive std for each of the 3 channels"):
        from_arrays(arrays(), mean, std)


def test_datasets_of_the_user():
    images = torch.randn(8, 3, 4, 4)
    data = from_datasets(Pairs(images, [0, 1, 2, 3] * 2), Pairs(images[:4], [0, 0, 1, 1]))
    assert (data.train.n_classes, data.test.n_classes, data.train.image_shape) == (4, 4, (3, 4, 4))
    part = data.train.select(torch.tensor([5, 2])).select(torch.tensor([1, 0]))
    batch, labels = part.batch(torch.tensor([1, 0]))
    assert torch.equal(batch, images[[5, 2]]) and labels.tolist() == [1, 2]
    assert part.labels.tolist() == [2, 1]


def test_datasets_of_another_form_are_refused():
    images = torch.randn(4, 3, 4, 4)
    cases = [
        (Pairs((images * 9).byte(), [0] * 4), "floating tensors (channels, height, width), got torch.uint8 of shape"),
        (Pairs([], []), "The dataset is empty; give at least one image."),
    ]
    for dataset, text in cases:
        with pytest.raises(UserError, match=re.escape(text)):
            DatasetImages(dataset, 2)
    spoilt = images.clone()
    spoilt[2] = torch.inf
    with pytest.raises(UserError, match="The dataset gave images with NaN or infinite values"):
        DatasetImages(Pairs(spoilt, [0] * 4), 2).batch(torch.arange(4))
    with pytest.raises(UserError, match=re.escape("Dataset labels must lie in 0..1, got 0..7.")):
        DatasetImages(Pairs(images, [0, 1, 7, 0]), 2).batch(torch.arange(4))
    ragged = [images[0], images[1, :, :3]]
    with pytest.raises(UserError, match="Dataset images differ in shape"):
        DatasetImages(Pairs(ragged, [0, 1]), 2).batch(torch.arange(2))


def test_torchvision_datasets_become_arrays(monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            if root == "nowhere":
                raise RuntimeError("Dataset not found")
            pixels = torch.from_numpy(arrays()["x_train" if train else "x_test"][..., 0])
            self.data, self.targets = pixels, [0, 1, 2] * (len(pixels) // 3)

    datasets = types.SimpleNamespace(MNIST=Fake)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=datasets))
    data = torchvision_dataset("MNIST", "here", (0.5,), (0.5,))
    assert (len(data.train), len(data.test), data.train.image_shape) == (12, 6, (1, 5, 6))
    with pytest.raises(UserError, match="torchvision has no dataset 'MINST'"):
        torchvision_dataset("MINST", "here", (0.5,), (0.5,))
    with pytest.raises(UserError, match=re.escape("could not read MNIST from 'nowhere' (Dataset not found)")):
        torchvision_dataset("MNIST", "nowhere", (0.5,), (0.5,))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=re.escape("install it with: pip install 'keepdrop[vision]'")):
        torchvision_dataset("MNIST", "here", (0.5,), (0.5,))


@pytest.mark.parametrize("reward_from", ["train", "test"])
def test_splits_are_disjoint_complete_and_reproducible(reward_from):
    data = LabelledData(array_images(40), array_images(20))
    drawn = split(data, reward_from=reward_from, reward_size=8, seed=3)
    assert len(drawn.reward) == 8 and drawn.sources["reward"] == reward_from and drawn.sources["report"] == "test"
    for source, count in (("train", 40), ("test", 20)):
        roles = [role for role in drawn.indices if drawn.sources[role] == source]
        assert sorted(np.concatenate([drawn.indices[role] for role in roles])) == list(range(count))
    again = split(data, reward_from=reward_from, reward_size=8, seed=3)
    assert again.hashes == drawn.hashes
    assert split(data, reward_from=reward_from, reward_size=8, seed=4).hashes["reward"] != drawn.hashes["reward"]
    stored = splits_at(data, drawn.indices, drawn.sources)
    assert stored.hashes == drawn.hashes
    assert json.loads(json.dumps(drawn.summary()))["reward"]["n_images"] == 8


def test_splits_of_class_sorted_data_hold_every_class():
    images = torch.zeros(1000, 1, 2, 2)
    source = ArrayImages(images, torch.arange(1000) // 100, (0,), (1,), 10)
    drawn = split(LabelledData(source, source), reward_from="test", reward_size=200, seed=0)
    for part in (drawn.reward, drawn.report):
        assert part.labels.bincount(minlength=10).min() > 0.05 * len(part)


def test_split_gives_the_images_it_names():
    data = LabelledData(array_images(40), array_images(20))
    drawn = split(data, reward_from="test", reward_size=8, seed=3)
    images, labels = drawn.reward.batch(torch.arange(8))
    expected, expected_labels = data.test.batch(torch.from_numpy(drawn.indices["reward"]))
    assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_hash_sees_a_changed_pixel_and_a_changed_label():
    def hashes(pixel=0, label=0):
        given = arrays()
        given["x_test"][0, 0, 0, 0], given["y_test"][0] = pixel, label
        return split(from_arrays(given, MEAN, STD), reward_from="train", reward_size=2, seed=0).hashes["report"]

    assert len({hashes(), hashes(pixel=1), hashes(label=1)}) == 3


@pytest.mark.parametrize(
    ("reward_from", "size", "text"),
    [
        ("train", 0, "The reward split would be empty: reward_size=0; give 1 or more images."),
        ("report", 5, "reward_from must be 'train' or 'test', got 'report'."),
    ],
)
def test_empty_splits_are_refused(reward_from, size, text):
    data = LabelledData(array_images(40), array_images(20))
    with pytest.raises(UserError, match=re.escape(text)):
        split(data, reward_from=reward_from, reward_size=size, seed=0)


@pytest.mark.parametrize(("reward_from", "size", "left"), [("train", 40, "fit"), ("test", 2000, "report")])
def test_a_reward_split_of_all_images_becomes_half_of_them(reward_from, size, left):
    """The README's reward_size on a small data set."""
    data = LabelledData(array_images(40), array_images(20))
    n_images = {"train": 40, "test": 20}[reward_from]
    said = f"reward_size={size} would take all {n_images} {reward_from} images and leave none for the {left} split;"
    with pytest.warns(Notice, match=said):
        drawn = split(data, reward_from=reward_from, reward_size=size, seed=0)
    assert len(drawn.reward) == len(getattr(drawn, left)) == n_images // 2
    with pytest.raises(UserError, match=f"The {left} split would be empty: there is 1 {reward_from} image; give at"):
        split(LabelledData(array_images(1), array_images(1)), reward_from=reward_from, reward_size=size, seed=0)


def test_boards_signals_and_volumes_are_images_too():
    """More channels than pixels a side (planes of a chess board), one side, three sides; labels in a column."""
    rng, labels = np.random.default_rng(0), {"y_train": np.arange(9)[:, None] % 3, "y_test": np.arange(6)[:, None] % 3}
    for shape in ((12, 8, 8), (64, 4, 4), (2, 50), (1, 4, 9, 8)):
        pixels = {f"x_{part}": rng.random((count, *shape), np.float32) for part, count in (("train", 9), ("test", 6))}
        data = from_arrays(pixels | labels)
        assert (data.train.image_shape, data.train.n_classes) == (shape, 3)
        images, found = data.train.batch(torch.arange(9))
        sides = tuple(range(2, images.dim()))
        torch.testing.assert_close(images.mean((0, *sides)), torch.zeros(shape[0]), atol=1e-4, rtol=0)
        assert found.tolist() == [0, 1, 2] * 3 and len(data.test.digest()) == 64
    frames = {part: rng.integers(0, 255, (6, 4, 9, 8, 3), dtype=np.uint8) for part in ("x_train", "x_test")}
    video = from_arrays(frames | {"y_train": np.arange(6) % 2, "y_test": np.arange(6) % 2})
    assert video.train.image_shape == (3, 4, 9, 8)
    boards = {part: rng.integers(0, 2, (6, 8, 8, 12), dtype=np.uint8) for part in ("x_train", "x_test")}
    assert from_arrays(boards | {"y_train": np.arange(6), "y_test": np.arange(6)}).train.image_shape == (12, 8, 8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"report": [3, 4, 5, 6]},
            "The reward and report splits share 2 test images (first: 3, 4); make them disjoint.",
        ),
        ({"report": []}, "The report split is empty; give it at least one image."),
        ({"report": [5, 20]}, "The report split names images 5..20, but its source has 20."),
        ({"fit": [1, 2, 2]}, "The fit split names 1 of its images twice; name each once."),
    ],
)
def test_overlapping_and_impossible_splits_are_refused(change, text):
    data = LabelledData(array_images(40), array_images(20))
    indices = {"fit": [0, 1], "reward": [2, 3, 4], "report": [5, 6]} | change
    sources = {"fit": "train", "reward": "test", "report": "test"}
    with pytest.raises(UserError, match=re.escape(text)):
        splits_at(data, {role: np.array(positions, dtype=np.int64) for role, positions in indices.items()}, sources)


def test_crop_is_a_shift_and_flip_a_mirror():
    images = torch.randn(64, 3, 6, 5)
    shifted = RandomCropFlip(padding=1, flip=False)(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    crops = torch.stack([padded[:, :, y : y + 6, x : x + 5] for y in range(3) for x in range(3)])
    equal = (shifted == crops).all(4).all(3).all(2)
    assert (equal.sum(0) == 1).all() and equal.any(1).all()
    mirrored = RandomCropFlip(padding=0)(images, torch.Generator().manual_seed(0))
    same, flipped = (mirrored == images).all(3).all(2).all(1), (mirrored == images.flip(3)).all(3).all(2).all(1)
    assert (same ^ flipped).all() and 10 < int(flipped.sum()) < 54


def test_augmentation_repeats_with_the_seed_and_leaves_its_input():
    images = torch.randn(8, 3, 6, 6)
    before = images.clone()
    first, again, other = (RandomCropFlip(2)(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(images, before)
    with pytest.raises(UserError, match="padding of 0 or more pixels, got -1"):
        RandomCropFlip(-1)


def cifar_accuracy(name, depth, n_images):
    data = npz(CIFAR, MEAN, STD)
    model = cifar_resnet(depth).eval()
    load_checkpoint(model, ROOT / "shared" / "checkpoints" / f"{name}.th")
    correct = 0
    with torch.inference_mode():
        for indices in torch.arange(n_images or len(data.test)).split(500):
            images, labels = data.test.batch(indices)
            logits = model(images.contiguous(memory_format=torch.channels_last))
            correct += int((logits.argmax(1) == labels).sum())
    return correct / (n_images or len(data.test))


needs_cifar = pytest.mark.skipif(
    not (CIFAR.is_file() and (ROOT / "shared").is_dir()),
    reason="CIFAR-10 and its checkpoints are not beside this repository",
)


@needs_cifar
def test_published_checkpoint_is_good_on_a_thousand_cifar_images():
    assert 0.89 < cifar_accuracy("resnet20-a", 20, 1000) < 0.94


@needs_cifar
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "depth", "accuracy"), [("resnet20-a", 20, 0.9173), ("resnet20-b", 20, 0.920), ("resnet56-a", 56, 0.934)]
)
def test_published_checkpoints_reach_their_accuracy_on_the_test_images(name, depth, accuracy):
    assert cifar_accuracy(name, depth, None) == pytest.approx(accuracy, abs=0.0005)
