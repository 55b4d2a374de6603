"""Folders of images: what is read from which file, what is refused, workers and cache that change nothing."""

import io
import os
import pickle
import re
import sys

import keepdrop
import numpy as np
import pytest
import torch
from keepdrop.envs.data.datasets import from_datasets
from keepdrop.envs.data.image_cache import Budget, ImageCache
from keepdrop.envs.data.image_folder import FolderImages, from_folder, image_folder
from keepdrop.envs.data.images import batches_of
from keepdrop.envs.data.sources import LabelledData
from keepdrop.envs.data.splits import splits_at
from keepdrop.errors import UserError
from keepdrop.experiments.api.data import three_splits
from torch.utils.data import Dataset

Image = pytest.importorskip("PIL.Image", reason="Pillow (extra vision) is not installed")
ImageOps = pytest.importorskip("PIL.ImageOps")
SOURCES = {"fit": "train", "reward": "train", "report": "test"}
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def noise(seed, height=20, width=14):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def put(folder, name, pixels, **options):
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    image.save(folder / name, **options)
    return folder / name


@pytest.fixture
def folder(tmp_path):
    """Ten images to train on and four to test on, of two classes."""
    for part, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(("ant", "cat")):
            for number in range(count):
                put(tmp_path / part / name, f"{number}.jpg", noise(100 * label + number + 10 * count))
    return tmp_path


def everything(images, **options):
    parts = torch.arange(len(images)).split(3)
    pixels, labels = zip(*batches_of(images, parts, **options), strict=True)
    return torch.cat(pixels), torch.cat(labels)


def test_images_are_cropped_normalised_and_numbered_by_class(tmp_path):
    for part in ("train", "val"):
        for name, colour in (("cat", (255, 0, 0)), ("ant", (0, 255, 0))):
            put(tmp_path / part / name, "one.png", Image.new("RGB", (20, 12), colour))
            (tmp_path / part / name / "._one.png").write_bytes(b"of another system")
            (tmp_path / part / name / "notes.txt").write_text("no image")
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
        (tmp_path / part / "__MACOSX").mkdir()
    data = image_folder(str(tmp_path), size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert isinstance(data, LabelledData) and data.train.classes == ("ant", "cat")
    assert (len(data.train), data.train.image_shape, data.train.n_classes) == (2, (3, 8, 8), 2)
    images, labels = data.test.batch(torch.arange(2))
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32 and labels.tolist() == [0, 1]
    assert images[:, :, 4, 4].tolist() == [[-1, 1, -1], [1, -1, -1]]
    grey = keepdrop.from_folder(tmp_path, 8, mean=[0.0], std=[1.0]).train
    assert grey.image_shape == (1, 8, 8) and grey.batch(torch.arange(1))[0].unique().tolist() == [
        pytest.approx(150 / 255)
    ]


def test_normalisation_and_digest_are_those_of_a_data_set_of_the_same_images(folder):
    """As image folders were read before: item by item, (pixels / 255 - mean) / std."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    class Items(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            with Image.open(folder / "train" / ("ant", "cat")[index // 5] / f"{index % 5}.jpg") as image:
                pixels = np.array(ImageOps.fit(image.convert("RGB"), (9, 9)))
            return (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std, index // 5

    ours, theirs = from_folder(folder, 9), from_datasets(Items(), Items(), 2)
    assert torch.equal(everything(ours.train)[0], everything(theirs.train)[0])
    assert ours.train.digest() == theirs.train.digest() != ours.test.digest()
    chosen = torch.tensor([7, 2, 5])
    some, same = ours.train.select(chosen), theirs.train.select(chosen)
    assert torch.equal(some.batch(torch.tensor([2, 0]))[0], same.batch(torch.tensor([2, 0]))[0])
    assert some.labels.tolist() == [1, 0, 1] and some.digest() == same.digest()


def test_resize_takes_the_centre_of_a_larger_image(tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[10:30, 10:30] = 255
    for part in ("train", "test"):
        for name in "ab":
            put(tmp_path / part / name, "1.png", pixels)
    whole, centre = (
        from_folder(tmp_path, 10, **PLAIN, resize=each).train.batch(torch.arange(1))[0] for each in (10, 20)
    )
    assert 0.2 < whole.mean() < 0.3 and centre[..., 1:-1, 1:-1].min() > 0.95
    with pytest.raises(UserError, match="resize is 8; expected at least the size that is cut out, 10"):
        from_folder(tmp_path, 10, resize=8)


def test_every_kind_of_file_is_read_as_it_is_seen(tmp_path):
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    red = Image.new("RGB", (8, 8), (255, 0, 51))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 51, *[9] * 762])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left side is up
    tall = np.zeros((8, 8, 3), np.uint8)
    tall[:, :4] = 255
    files = [
        put(tmp_path / "a", "a16.png", ramp),
        put(tmp_path / "a", "b8.png", (ramp // 257).astype(np.uint8)),
        put(tmp_path / "a", "c.png", palette, transparency=bytes([0, 128])),
        put(tmp_path / "a", "d.png", red.convert("RGBA")),
        put(tmp_path / "a", "e.jpg", red.convert("CMYK"), quality=100),
        put(tmp_path / "a", "f.gif", red),
        put(tmp_path / "a", "g.webp", red, lossless=True),
        put(tmp_path / "a", "h.tiff", red),
        put(tmp_path / "a", "i.jpg", tall, exif=exif, quality=100),
    ]
    put(tmp_path / "b", "one.png", red)
    data = from_folder(tmp_path, 8, **PLAIN, test_fraction=0.01)
    by_file = {path: image for path, image in zip(data.train.files.paths, everything(data.train)[0], strict=True)}
    by_file |= {path: image for path, image in zip(data.test.files.paths, everything(data.test)[0], strict=True)}
    images = [by_file[str(path)] for path in files]
    assert (images[0] - images[1]).abs().max() <= 1 / 255 and images[0].max() > 0.9 and images[0].mean() < 0.6
    for image, tolerance in zip(images[2:8], (0, 0, 0.02, 0, 0, 0), strict=True):
        assert image[:, 3, 3].tolist() == pytest.approx([1, 0, 0.2], abs=tolerance + 1e-6)
    assert images[8][:, :3].min() > 0.95 and images[8][:, 5:].max() < 0.05
    bad = put(tmp_path / "a", "j.tiff", np.full((8, 8), 0.5, np.float32))
    data = from_folder(tmp_path, 8, test_fraction=0.01)
    part = data.test if str(bad) in data.test.files.paths else data.train
    with pytest.raises(
        UserError, match=r"j\.tiff' holds floating values from 0\.5 to 0\.5, whose white is unknown; sa"
    ):
        everything(part)


def test_large_jpegs_are_decoded_at_a_part_of_their_size(tmp_path):
    pixels = np.asarray(Image.fromarray(noise(3, 5, 5)).resize((256, 256), Image.Resampling.BICUBIC))
    for part in ("train", "test"):
        for name in "ab":
            path = put(tmp_path / part / name, "1.jpg", pixels, quality=95)
    images, _ = from_folder(tmp_path, 16, **PLAIN).train.batch(torch.arange(1))
    with Image.open(path) as image:
        whole = torch.from_numpy(np.array(ImageOps.fit(image, (16, 16)))).permute(2, 0, 1) / 255
    assert 0 < (images[0] - whole).abs().mean() < 0.01


def test_a_folder_without_a_split_is_divided_on_demand(folder):
    single = folder / "train"
    with pytest.raises(UserError, match=re.escape(f"'{single}' holds ant, cat; expected train/CLASS/* and")) as caught:
        from_folder(single, 8)
    assert str(caught.value).endswith("test_fraction=0.2.") and "data.test_fraction=0.2." in caught.value.typed
    parts = [from_folder(single, 8, test_fraction=0.4, seed=seed) for seed in (0, 0, 1)]
    assert [len(parts[0].train), len(parts[0].test)] == [6, 4] and parts[0].test.labels.tolist() == [0, 0, 1, 1]
    assert not set(parts[0].train.files.paths) & set(parts[0].test.files.paths)
    assert parts[0].test.files.paths == parts[1].test.files.paths != parts[2].test.files.paths
    with pytest.raises(UserError, match="holds test images in 'val' already; leave test_fraction out"):
        from_folder(folder, 8, test_fraction=0.4)
    with pytest.raises(UserError, match=re.escape("test_fraction must lie between 0 and 1, got 1.5.")):
        from_folder(single, 8, test_fraction=1.5)


def test_folders_that_cannot_be_used_are_refused_before_anything_is_read(folder, tmp_path_factory):
    with pytest.raises(UserError, match="There is no image folder"):
        from_folder(folder / "gone")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="holds nothing; expected"):
        from_folder(empty)
    for part in ("train", "test"):
        (empty / part / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images in class sub-folders"):
        from_folder(empty)
    for part in ("train", "test"):
        put(empty / part / "cat", "1.png", noise(0))
    with pytest.raises(UserError, match="holds a single class, cat; expected two or more"):
        from_folder(empty)
    (folder / "val" / "bee").mkdir()
    with pytest.raises(UserError, match=re.escape("differ in their classes: bee (only in val); give both the same")):
        from_folder(folder)
    (folder / "train" / "bee").mkdir()
    with pytest.raises(UserError, match="There are no images to train on of bee"):
        from_folder(folder)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 0}, "size is 0; expected a number from 1 to 8,192"),
        ({"workers": -1}, "workers is -1; expected a number from 0 to 256"),
        ({"cache_gib": float("nan")}, "cache_gib is nan; expected a number from 0"),
        ({"cache_gib": None}, "cache_gib is not given; expected a number from 0"),
        ({"size": None}, "size is not given; expected a number from 1"),
        ({"size": [8, 8]}, "size is [8, 8]; expected a number from 1"),
        ({"resize": (8, 8)}, "resize is (8, 8); expected a number from 1"),
        ({"mean": ("a",) * 3}, "A number of mean is 'a'; expected a number from"),
        ({"std": (float("nan"), 1, 1)}, "A number of std is nan; expected a number from"),
        ({"mean": (), "std": ()}, "Expected one mean and one positive std per channel"),
        ({"test_fraction": "a"}, "test_fraction must lie between 0 and 1, got a."),
        ({"mean": (0.5,) * 3, "std": (0.5,)}, "Expected one mean and one positive std per channel"),
        ({"mean": (0.5,) * 4, "std": (0.5,) * 4}, "have 3 channels (RGB) or 1 (grey), but mean and std hold 4"),
    ],
)
def test_options_out_of_range_are_refused(folder, options, text):
    with pytest.raises(UserError, match=re.escape(text)):
        from_folder(folder, **options)


def damaged(kind):
    """Bytes of a file that is called an image, and what is said of it."""
    stream = io.BytesIO()
    Image.fromarray(noise(0, 64, 64)).save(stream, "PNG" if kind == "png" else "JPEG")
    whole = stream.getvalue()
    return {
        "empty": (b"", "not a JPEG"),
        "text": (b"<html>not found</html>", "not a JPEG"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch x) (w) file", "not a JPEG"),
        "jpg": (whole[: len(whole) // 2], "truncated"),
        "png": (whole[: len(whole) // 2], "truncated"),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "postscript", "jpg", "png"])
def test_a_damaged_file_is_named_before_anything_else(folder, kind):
    content, reason = damaged(kind)
    path = folder / "train" / "cat" / "3.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"3\.jpg' is not a readable image \(.*{reason}.*\); fix or remove it\.$"):
        from_folder(folder, 8)
    (folder / "train" / "ant" / "9.png").write_bytes(content)
    with pytest.raises(UserError, match=r"9\.png' is not .* remove it, and 1 more: .*3\.jpg\.$"):
        from_folder(folder, 8)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_a_pipe_among_the_files_is_not_waited_for(folder):
    os.mkfifo(folder / "train" / "cat" / "pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg' is not a readable image \(OSError: no regular file\)"):
        from_folder(folder, 8)


def test_test_images_are_those_with_the_classes_of_training(folder):
    """Contests put images without labels into one folder of `test`."""
    put(folder / "test" / "unknown", "0.jpg", noise(0))
    assert len(from_folder(folder, 8).test) == 4
    (folder / "val").rename(folder / "other")
    with pytest.raises(UserError, match=r"unknown \(only in test\)"):
        from_folder(folder, 8)


def test_one_number_as_mean_and_std_makes_images_grey(folder):
    assert from_folder(folder, 8, mean=0.5, std=0.5).train.image_shape == (1, 8, 8)
    with pytest.raises(UserError, match="path of an image folder is None"):
        from_folder(None)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_damaged_later_is_named_as_well(folder, workers, monkeypatch):
    monkeypatch.setattr("keepdrop.envs.data.image_folder.job_size", lambda item_bytes: 2)
    data = from_folder(folder, 8, workers=workers)
    (folder / "train" / "cat" / "3.jpg").write_bytes(b"gone")
    with pytest.raises(UserError, match=r"3\.jpg' is not a readable image") as caught:
        everything(data.train)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("cache_gib", [0, 6 * 8 * 8 * 3 / 2**30, 1])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_and_cache_change_no_bit(folder, workers, cache_gib, monkeypatch):
    monkeypatch.setattr("keepdrop.envs.data.image_folder.job_size", lambda item_bytes: 2)
    wanted, labels = everything(from_folder(folder, 8, workers=0, cache_gib=0).train)
    data = from_folder(folder, 8, workers=workers, cache_gib=cache_gib)
    part = data.train.select(torch.arange(9, -1, -1))
    for _ in range(2):
        images, found = everything(part)
        assert torch.equal(images.flip(0), wanted) and torch.equal(found.flip(0), labels)
    kept = data.train.cache.n_bytes // (8 * 8 * 3)
    assert kept == {0: 0, 1: 10}.get(cache_gib, 6) and part.cache is data.train.cache
    assert torch.equal(everything(data.train)[0], wanted)


def test_a_cache_under_a_budget_keeps_what_comes_first_and_stays_where_it_is():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 2, 2, 1)
    budget = Budget(4 * 4)
    ours, theirs = ImageCache(3, budget), ImageCache(5, budget)
    ours.keep(torch.tensor([2, 0, 2]), images[[2, 0, 1]])
    theirs.keep(torch.arange(5), images)
    assert ours.holds(torch.arange(3)).tolist() == [True, False, True] and ours.image(2).unique().tolist() == [2]
    assert theirs.holds(torch.arange(5)).sum() == 1 and budget.left == 0
    assert ours.n_bytes + theirs.n_bytes == 16
    copy = pickle.loads(pickle.dumps(theirs))
    assert not copy.holds(torch.arange(5)).any() and copy.budget.left == 16


def test_images_that_are_kept_need_their_files_no_more(folder):
    data = from_folder(folder, 8, cache_gib=0)
    wanted = everything(data.train)
    kept = data.train.resident()
    for path in data.train.files.paths:
        (folder / path).unlink()
    assert all(map(torch.equal, everything(kept), wanted)) and kept.cache.n_bytes == 10 * 8 * 8 * 3


def test_reward_images_of_a_folder_stay_as_bytes(folder):
    data = from_folder(folder, 8)
    splits = three_splits(data, "train", 4, 0)
    images, labels = splits.reward.batch(torch.arange(4))
    wanted, found = data.train.batch(torch.from_numpy(splits.indices["reward"]))
    assert torch.equal(images, wanted) and torch.equal(labels, found) and splits.reward.cache.n_bytes == 4 * 8 * 8 * 3


@pytest.mark.skipif(sys.platform != "linux", reason="how much memory is left is told by Linux")
def test_a_reward_split_beyond_memory_is_refused(folder, monkeypatch):
    data = from_folder(folder, 8)
    monkeypatch.setattr(FolderImages, "image_shape", property(lambda images: (3, 2**20, 2**20)))
    with pytest.raises(UserError, match=r"The reward split of 4 images \(3, .*\) takes 49,152\.0 GiB of") as caught:
        splits_at(data, {"fit": np.arange(4, 10), "reward": np.arange(4), "report": np.arange(4)}, SOURCES)
    assert "split.reward_size" in caught.value.typed
