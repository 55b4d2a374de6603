"""Several inputs go into one tensor and come out as they were, whatever holds them."""

import re

import numpy as np
import pytest
import torch
from keepdrop import UserError, from_datasets
from keepdrop.envs.data.packing import MOST, Packing, packed_batch, packing_of
from torch.utils.data import DataLoader

LEFT, RIGHT = torch.rand(2, 6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
KINDS, LABELS = torch.tensor([0, 3, MOST, -MOST, 7, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
FLAGS = KINDS > 2


class Items(list):
    pass


def check(images, expected):
    packed, labels = images.batch(torch.arange(6))
    found = packing_of(images).unpacked(packed)
    names = range(len(expected)) if isinstance(expected, tuple) else expected
    assert len(found) == len(expected) and torch.equal(labels, LABELS)
    for name in names:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])


PAIRS = (LEFT, RIGHT, KINDS, FLAGS)
NAMED = {"right": RIGHT, "left": LEFT, "kind": KINDS}


@pytest.mark.parametrize("given", [PAIRS, NAMED], ids=["positional", "keywords"])
def test_what_is_packed_comes_out_as_it_was(given):
    parts = {name: value for name, value in given.items()} if isinstance(given, dict) else given

    def item(index):
        if isinstance(parts, dict):
            return {name: value[index] for name, value in parts.items()}
        return [value[index].numpy() if position == 0 else value[index] for position, value in enumerate(parts)]

    items = Items((item(index), int(LABELS[index])) for index in range(6))
    loader = DataLoader(items, 2, shuffle=True, collate_fn=lambda some: torch.utils.data.default_collate(some))
    for form in (items, loader, (given, LABELS), (given, LABELS.numpy())):
        data = from_datasets(form, form)
        check(data.train, given)
        assert packing_of(data.train.select(torch.tensor([1, 2]))) == packing_of(data.train)
    assert Packing.from_facts(packing_of(data.train).facts()) == packing_of(data.train)


def test_a_mapping_may_name_its_inputs_in_any_order():
    one, other = ({"a": LEFT[0], "b": RIGHT[0]}, 0), ({"b": RIGHT[1], "a": LEFT[1]}, 1)
    images = from_datasets(Items([one, other]), Items([other, one])).train
    found = packing_of(images).unpacked(images.batch(torch.arange(2))[0])
    assert torch.equal(found["a"], LEFT[:2]) and torch.equal(found["b"], RIGHT[:2])


@pytest.mark.parametrize(
    ("train", "text"),
    [
        (
            Items([((LEFT[0], RIGHT[0]), 0), ((LEFT[0], RIGHT[0, :, :2]), 1)]),
            "The inputs of a dataset's items differ: (1",
        ),
        (
            Items([((LEFT[0], "cat"), 0)]),
            "Input 1 of a dataset's item is a str; expected a tensor, an array or a number",
        ),
        (
            Items([((LEFT[0], MOST + 1), 0)]),
            "An input of whole numbers holds 16777217; expected none beyond 16,777,216",
        ),
        (
            ((LEFT, RIGHT[:3]), LABELS),
            "The inputs have shapes (6, 1, 4, 4), (3, 1, 4, 4); expected as many items along",
        ),
        ((LEFT, LABELS), "Train and test images differ in inputs: None against (1, 4, 4), (1, 4, 4)"),
        (((LEFT, RIGHT * float("nan")), LABELS), "hold NaN or infinite values"),
    ],
)
def test_inputs_that_do_not_fit_are_a_sentence(train, text):
    with pytest.raises(UserError, match=re.escape(text)):
        data = from_datasets(train, ((LEFT, RIGHT), LABELS))
        data.train.batch(torch.arange(len(data.train)))


@pytest.mark.parametrize(
    "facts", [None, [], [[1, [2], "bool"]], [["a", [-1], "bool"]], [[None, [2], "complex64"]], [[]]]
)
def test_damaged_facts_of_a_file_are_refused(facts):
    with pytest.raises(ValueError, match="is no input"):
        Packing.from_facts(facts)


def test_views_of_numpy_arrays_are_read():
    batch, packing = packed_batch((LEFT.numpy()[::-1], np.arange(6)))
    assert torch.equal(packing.unpacked(batch)[0], LEFT.flip(0))


def test_a_number_is_one_number_whatever_holds_it():
    """As in batches of torch's own collation, where an array without sides gives (B,)."""
    for speed in (0.5, torch.tensor(0.5), np.float32(0.5), np.array(0.5, np.float32)):
        data = from_datasets(Items([((LEFT[0], speed), 0)]), Items([((RIGHT[0], 0.5), 0)]))
        assert packing_of(data.train).unpacked(data.train.batch(torch.arange(1))[0])[1].shape == (1,)
