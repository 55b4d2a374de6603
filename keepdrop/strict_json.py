"""Strict JSON: files are read without what Python lets pass: NaN, infinite numbers and keys that occur twice."""

from __future__ import annotations

import json
import math
from typing import Any


def parse_json(text: str | bytes, largest_integer: int | None = None) -> Any:
    """The content of a JSON text.

    Args:
        text: bytes are UTF-8.
        largest_integer: bound of the absolute value of whole numbers; None for none.

    Raises:
        ValueError: what is no strict JSON; its message is the reason, to stand inside a sentence.
        RecursionError: containers nested too deeply.
    """

    def bounded(digits: str) -> int:
        value = int(digits)
        if largest_integer is not None and abs(value) > largest_integer:
            raise ValueError(f"a whole number of {len(digits)} digits")
        return value

    return json.loads(
        text, object_pairs_hook=_without_duplicates, parse_constant=_refused, parse_float=_finite, parse_int=bounded
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python keeps the last of two equal keys, another reader the first: a file must not have two."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a key twice")
    return found


def _refused(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(number: str) -> float:
    """Python reads 1e999 as infinity."""
    if not math.isfinite(value := float(number)):
        raise ValueError(f"it holds the number {number}")
    return value
