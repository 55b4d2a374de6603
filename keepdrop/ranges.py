"""Ranges of numeric settings: nan, infinite, negative and absurd values are one sentence, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .errors import UserError

COUNT = (1, 10**6)
COUNT_OR_NONE = (0, 10**6)
IMAGES = (1, 10**9)  # more than there are is all of them
IMAGES_OR_NONE = (0, 10**9)
MASKS = (2, 10**5)  # at a time
FRACTION = (0.0, 1.0)
POSITIVE = (1e-30, 1e6)  # a rate, a weight, a scale
NOT_NEGATIVE = (0.0, 1e6)
SEED = (0, 2**63 - 1)


def check_numbers(settings: Any, **ranges: tuple[float, float]) -> None:
    """Raise a `UserError` for the first number outside its range, both ends inside; None passes.

    Args:
        settings: an object with the attributes named, each a number, a list of them or None.
        ranges: lowest and highest value by attribute; two ints for what has to be whole.
    """
    for name, bounds in ranges.items():
        check_number(name, getattr(settings, name), bounds)


def check_number(name: str, value: Any, bounds: tuple[float, float]) -> None:
    """The same for one value; where both ends are ints, it counts something and has to be whole."""
    low, high = bounds
    is_count = isinstance(low, int) and isinstance(high, int)
    for each in value if isinstance(value, Iterable) and not isinstance(value, str) else [value]:
        if each is None:
            continue
        is_number = hasattr(each, "__float__")
        if not is_number or not (math.isfinite(each) and low <= each <= high):
            wanted = "above 0 and up" if 0 < low < 1e-9 else f"from {_shown(low)}"
            came = _shown(each) if is_number else repr(each)
            raise UserError(f"{name} is {came}; expected a number {wanted} to {_shown(high)}.")
        if is_count and not hasattr(each, "__index__"):
            raise UserError(f"{name} is {each!r}; expected a whole number from {_shown(low)} to {_shown(high)}.")


def check_given(name: str, value: Any, bounds: tuple[float, float]) -> None:
    """The same for one number that has to be there: None and lists are refused, too."""
    check_number(name, [value], bounds)
    if value is None:
        raise UserError(f"{name} is not given; expected a number from {_shown(bounds[0])} to {_shown(bounds[1])}.")


def _shown(value: float) -> str:
    """Whole numbers with all their digits."""
    return f"{int(value):,}" if math.isfinite(value) and float(value).is_integer() else f"{value:g}"
