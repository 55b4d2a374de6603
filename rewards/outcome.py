"""What one pruning decision did to the network, and what that was worth."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from ..errors import UserError


@dataclass(frozen=True)
class Outcome:
    """The measured effect of one keep mask, beside the base network it was cut from.

    Attributes:
        base_accuracy: accuracy of the unpruned network on the reward split, a fraction in [0, 1].
        pruned_accuracy: accuracy of the pruned network on the same images, a fraction in [0, 1].
        n_filters: filters the decision was about, at least 1.
        n_kept: filters it kept, 0 to n_filters. 0 can be recorded, but some rewards are not defined there.
        base_macs: multiply-accumulates per image of the unpruned network.
        pruned_macs: the same of the pruned network, 0 to base_macs.
        base_params: parameters of the unpruned network.
        pruned_params: parameters of the pruned network, 0 to base_params.
        base_seconds: latency of the unpruned network by a profile of the device, or None where there is none.
        pruned_seconds: the same of the pruned network; given exactly where base_seconds is. It may exceed
            base_seconds: MACs can fall while time does not.

    Raises:
        ValueError: a value outside its range; UserError where the likeliest cause is a percentage.
    """

    base_accuracy: float
    pruned_accuracy: float
    n_filters: int
    n_kept: int
    base_macs: int
    pruned_macs: int
    base_params: int
    pruned_params: int
    base_seconds: float | None = None
    pruned_seconds: float | None = None

    def __post_init__(self) -> None:
        _check_fraction("base_accuracy", self.base_accuracy)
        _check_fraction("pruned_accuracy", self.pruned_accuracy)
        _check_count("n_kept", self.n_kept, "n_filters", self.n_filters)
        _check_count("pruned_macs", self.pruned_macs, "base_macs", self.base_macs)
        _check_count("pruned_params", self.pruned_params, "base_params", self.base_params)
        _check_seconds(self.base_seconds, self.pruned_seconds)

    @property
    def accuracy_drop(self) -> float:
        """Base minus pruned accuracy, a fraction; negative where pruning helped."""
        return self.base_accuracy - self.pruned_accuracy

    @property
    def kept_fraction(self) -> float:
        """Kept filters / all filters, in [0, 1]."""
        return self.n_kept / self.n_filters

    @property
    def macs_fraction(self) -> float:
        """Pruned MACs / base MACs, in [0, 1]: what is left, not what was removed."""
        return self.pruned_macs / self.base_macs

    @property
    def params_fraction(self) -> float:
        """Pruned parameters / base parameters, in [0, 1]."""
        return self.pruned_params / self.base_params

    @property
    def seconds_fraction(self) -> float:
        """Pruned latency / base latency; above 1 where pruning made the network slower.

        Raises:
            UserError: the latency was not measured.
        """
        if self.base_seconds is None or self.pruned_seconds is None:
            raise UserError(
                "this outcome has no measured latency; give a profile of the device, or aim at macs or params instead"
            )
        return self.pruned_seconds / self.base_seconds


@dataclass(frozen=True)
class Reward:
    """A reward and the named terms it was made of.

    Attributes:
        value: what the agent learns from; finite.
        terms: read-only; every term by name, for `info` and the logs.
    """

    value: float
    terms: Mapping[str, float]

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"a reward is finite, this one is {self.value} (terms {dict(self.terms)})")
        object.__setattr__(self, "terms", MappingProxyType(dict(self.terms)))

    def __reduce__(self) -> tuple[type["Reward"], tuple[float, dict[str, float]]]:
        # The read-only view cannot be pickled or deep-copied itself, and rewards cross process borders.
        return (Reward, (self.value, dict(self.terms)))


RewardFunction: TypeAlias = Callable[[Outcome], Reward]


def _check_fraction(name: str, value: float) -> None:
    if 0.0 <= value <= 1.0:
        return
    if 1.0 < value <= 100.0:
        raise UserError(
            f"{name} is {value}, but accuracy is a fraction in [0, 1]; if it is a percentage, divide by 100"
        )
    raise ValueError(f"{name} is {value}, but accuracy is a fraction in [0, 1]")


def _check_count(part_name: str, part: int, whole_name: str, whole: int) -> None:
    if whole < 1:
        raise ValueError(f"{whole_name} is {whole}, but it must be at least 1")
    if not 0 <= part <= whole:
        raise ValueError(f"{part_name} is {part}, but it must lie between 0 and {whole_name} ({whole})")


def _check_seconds(base: float | None, pruned: float | None) -> None:
    if (base is None) != (pruned is None):
        raise ValueError("base_seconds and pruned_seconds are given together or not at all")
    for name, value in (("base_seconds", base), ("pruned_seconds", pruned)):
        if value is not None and not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"{name} is {value}, but a latency is a finite number of seconds above 0")
