"""Advice is written as the caller writes: Python from Python, settings on the command line."""

import pickle

import pytest
from keepdrop import Limits, UserError


def test_advice_of_both_callers(refused):
    with pytest.raises(UserError) as caught:
        Limits(protect=[1])
    assert str(caught.value).endswith('as in Limits(protect={"conv1": [0, 3]}).')
    assert refused("prune", "surgery.protect=[1]").endswith("as in surgery.protect={conv1:[0,3]}.")
    again = pickle.loads(pickle.dumps(caught.value))  # a worker process hands it over
    assert str(again) == str(caught.value) and again.typed == caught.value.typed


def test_a_sentence_without_advice_is_the_same():
    assert UserError("No.").typed == str(UserError("No.")) == "No."
