"""Strict JSON: what Python's reader lets pass, and a file of ours must not hold."""

import pytest
from keepdrop.strict_json import parse_json


def test_plain_json_is_read():
    assert parse_json(b'{"a": [1, -2.5e3, null, true], "b": {"a": "\xc3\xa9"}}') == {
        "a": [1, -2500.0, None, True],
        "b": {"a": "é"},
    }
    assert parse_json("9" * 30) == int("9" * 30) and parse_json("-8", largest_integer=8) == -8


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "it has a key twice"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e999]", "it holds the number 1e999"),
        ("[-9]", "a whole number of 2 digits"),
        ("[1", "Expecting"),
        (b"[\xff]", "codec can't decode"),
    ],
)
def test_what_is_no_strict_json_says_why(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text, largest_integer=8)
