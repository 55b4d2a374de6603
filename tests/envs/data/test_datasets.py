"""What users have: items are read, not what their dataset says of itself; loaders, arrays, mappings, triples."""

import re

import keepdrop
import numpy as np
import pytest
import torch
from keepdrop.envs.data.datasets import DatasetImages, from_datasets
from keepdrop.errors import UserError
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset, default_collate

IMAGES = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 3


class Items:
    """A dataset of these items; other attributes as given."""

    def __init__(self, items, **attributes):
        self.items, self.n_read = items, 0
        self.__dict__ |= attributes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.n_read += 1
        return self.items[index]


def pairs(labels, images=IMAGES):
    return list(zip(images, labels, strict=False))


HELD_ALIKE = {
    "numpy": [(image.numpy(), int(label)) for image, label in zip(IMAGES, LABELS, strict=True)],
    "flipped views": [
        (image.numpy()[:, ::-1][:, ::-1], int(label)) for image, label in zip(IMAGES, LABELS, strict=True)
    ],
    "labels in a column": [(image, np.array([label])) for image, label in zip(IMAGES, LABELS.numpy(), strict=True)],
    "tensors of labels": [(image, label[None]) for image, label in zip(IMAGES, LABELS, strict=True)],
    "triples": [(image, int(label), index) for index, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True))],
    "mappings": [{"pixel_values": image, "labels": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)],
}


@pytest.mark.parametrize("form", HELD_ALIKE)
def test_items_of_many_forms_are_one_data_set(form):
    images = from_datasets(Items(HELD_ALIKE[form]), Items(pairs([0, 1, 2], OTHERS))).train
    found, labels = images.batch(torch.tensor([7, 2]))
    assert torch.equal(found, IMAGES[[7, 2]]) and torch.equal(labels, LABELS[[7, 2]])
    assert images.n_classes == 3 and torch.equal(images.labels, LABELS)


@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": [["cat", "dog", "emu"][label] for label in LABELS]},
        {"targets": ((LABELS + 4) % 9).tolist()},  # before a target transform
        {"targets": [0, 1]},
        {"targets": torch.rand(12)},
        {"classes": ["cat", "dog"]},
        {"classes": [str(number) for number in range(1000)]},
    ],
)
def test_attributes_that_disagree_with_the_items_are_not_believed(attributes):
    images = DatasetImages(Items(pairs(LABELS), **attributes))
    assert images.n_classes == 3 and torch.equal(images.labels, LABELS)


def test_listed_labels_that_agree_spare_the_reading_of_every_item():
    images = IMAGES[:1].expand(5000, 3, 4, 4)
    labels = torch.arange(5000) % 7
    dataset = Items(pairs(labels, images), targets=labels.tolist())
    assert DatasetImages(dataset).n_classes == 7 and dataset.n_read < 100
    part = DatasetImages(Subset(TensorDataset(images, labels[:, None]), range(3, 5000, 7)))
    assert part.n_classes == 4 and set(part.labels.tolist()) == {3}


def test_pairs_of_arrays_and_the_number_of_classes():
    data = keepdrop.from_datasets((IMAGES.numpy(), LABELS.numpy()[:, None]), (OTHERS, torch.arange(6)))
    assert data.train.n_classes == data.test.n_classes == 6, "as many as both need"
    assert torch.equal(data.train.batch(torch.arange(12))[0], IMAGES) and data.train.labels.shape == (12,)
    assert keepdrop.from_datasets((IMAGES, LABELS), (OTHERS, LABELS[:6]), n_classes=9).test.n_classes == 9
    ages = keepdrop.from_datasets((IMAGES, LABELS), (OTHERS, LABELS[:6]), n_classes=0)
    assert ages.train.n_classes == 0
    drawn = keepdrop.split(data, reward_from="test", reward_size=2, seed=0)
    assert [len(part) for part in (drawn.fit, drawn.reward, drawn.report)] == [12, 2, 4]
    assert all(len(public.__doc__) > 300 for public in (keepdrop.from_datasets, keepdrop.split))


def test_a_loader_keeps_its_dataset_its_subset_and_its_collation():
    whole = TensorDataset(IMAGES, LABELS)
    data = from_datasets(DataLoader(whole, 5, shuffle=True), DataLoader(TensorDataset(OTHERS, LABELS[:6])))
    assert torch.equal(data.train.batch(torch.arange(12))[0], IMAGES)
    # A train and a validation loader of one dataset, as in many tutorials.
    kept, held_out = (DataLoader(whole, sampler=SubsetRandomSampler(rows)) for rows in ([0, 3, 4], [1, 2]))
    data = from_datasets(kept, held_out)
    assert torch.equal(data.train.batch(torch.arange(3))[0], IMAGES[[0, 3, 4]])
    assert torch.equal(data.test.labels, LABELS[[1, 2]])

    def collate(items):
        return {"image": torch.stack([image / 2 for image, _ in items]), "label": torch.stack([y for _, y in items])}

    halved = from_datasets(DataLoader(whole, collate_fn=collate), (OTHERS, LABELS[:6])).train
    assert torch.equal(halved.batch(torch.tensor([4]))[0], IMAGES[[4]] / 2) and torch.equal(halved.labels, LABELS)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(pairs(LABELS))


class Picture:
    """As Pillow's images."""

    mode = "I;16"

    def getbands(self):
        return ("I",)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (Items([(Picture(), 0)]), "got as an image Picture (mode I;16); add a transform that makes one."),
        (Items([(IMAGES[0], OTHERS[0], 1)]), "of which the second could be an input or a target; give (image, target)"),
        (Items([{"left": IMAGES[0], "label": 1}]), "a mapping of left, label; expected an image under one of image, "),
        (Items(IMAGES), "A dataset must give (image tensor, label), got torch.float32 (3, 4, 4)."),
        (Items(pairs(["cat", "dog"] * 6)), "A dataset must give an integer label, or a target that is a number"),
        (Items(pairs([0, 1, [2, 3]])), "Dataset targets differ in shape: a list of int, int came after a single"),
        (
            DataLoader(Stream()),
            "train is a DataLoader of an iterable dataset, whose images have no numbers;",
        ),
        ("cifar10", "train is a str; expected a map-style dataset of (image tensor, integer label), a DataLoader of"),
        ((IMAGES.byte(), LABELS), "train is images torch.uint8 (12, 3, 4, 4) and labels (12,); expected floating"),
        ((IMAGES.numpy(), LABELS.numpy() - 1), "The labels of train are torch.int64 from -1; expected integers from 0"),
    ],
)
def test_what_cannot_be_read_is_a_sentence_without_the_command_line(given, text):
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        from_datasets(given, (OTHERS, LABELS[:6]))
    assert not re.search(r"\w=\w", str(caught.value))


def test_the_digest_covers_pixels_but_not_random_ones():
    changed = IMAGES.clone()
    changed[11, 0, 0, 0] += 1
    digests = [DatasetImages(TensorDataset(images, LABELS)).digest() for images in (IMAGES, IMAGES.clone(), changed)]
    assert digests[0] == digests[1] != digests[2]

    class Noisy(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + torch.rand(()), label

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    noisy = DatasetImages(Noisy(IMAGES, LABELS), 3)
    one = noisy.digest()
    assert one == DatasetImages(Noisy(changed, LABELS), 3).digest(), "augmented images have no digest to compare"
    torch.manual_seed(3)
    noisy._digest = None
    assert noisy.digest() == one and torch.equal(torch.rand(1), expected), "the caller's generator is left alone"


def test_an_item_that_cannot_be_read_is_named():
    class Damaged(TensorDataset):
        def __getitem__(self, index):
            if index == 7:
                raise OSError("cannot identify image file 'seven.png'")
            return super().__getitem__(index)

    text = "Item 7 of a dataset cannot be read (OSError: cannot identify image file 'seven.png')"
    for given in (
        Damaged(IMAGES, LABELS),
        DataLoader(Damaged(IMAGES, LABELS), collate_fn=lambda batch: default_collate(batch)),
    ):
        with pytest.raises(UserError, match=re.escape(text)):
            from_datasets(given, (OTHERS, LABELS[:6]))
