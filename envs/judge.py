"""How masks are judged: the settings behind every outcome."""

from __future__ import annotations

from dataclasses import dataclass

from ..rewards.errors import UserError

TARGETS = ("dense", "current")


@dataclass(frozen=True)
class JudgeSettings:
    """How masks are judged.

    Args:
        compensate: regress dropped channels on the kept ones and fold the result into the consumers, in the reward as
            well as in the surgery (design page, fact 11).
        target: what the regression aims at: the channels of the "dense" network, so that the drift of earlier cuts is
            corrected too, or those of the "current" network, right before the cut.
        ridge: strength of that regression's ridge, relative to the mean channel energy.
        compensation_images: images of the fit split behind the regression.
        statistics_images: images of the fit split behind an observation.
        cache_gib: memory for the cached part of the network that no mask touches, in GiB.
        method: "auto", "split" or "whole" (`MaskedNetwork`).
    """

    compensate: bool = True
    target: str = "dense"
    ridge: float = 1e-3
    compensation_images: int = 1000
    statistics_images: int = 512
    cache_gib: float = 1.0
    method: str = "auto"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UserError(f"judge.target is {self.target!r}; expected one of {', '.join(TARGETS)}.")
