"""Evaluation settings: how masks are evaluated, behind every outcome."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import UserError
from ...ranges import IMAGES, IMAGES_OR_NONE, NOT_NEGATIVE, POSITIVE, check_numbers
from .masked_network import DTYPES

TARGETS = ("trained", "dense", "current")


@dataclass(frozen=True)
class EvaluationSettings:
    """How masks are evaluated.

    Args:
        compensate: regress dropped channels on the kept ones and fold the result into the consumers, in the reward as
            well as in the surgery (design page, fact 11).
        target: whose channels the regression aims at: those of the network as it was "trained" last (the dense one, or
            what recovery left), so that the drift of the cuts since then is corrected too; those of the "dense"
            network whatever recovery made of it; or those of the "current" network, right before the cut.
        ridge: strength of that regression's ridge, relative to the mean channel energy.
        compensation_images: images of the fit split behind the regression.
        statistics_images: images of the fit split behind an observation.
        cache_gib: memory for the cached values that no mask changes, in GiB.
        method: "auto", "split" or "whole" (`MaskedNetwork`).
        dtype: precision of masks during a search, "float32" or "bfloat16"; a decision is always verified in float32,
            and how often the two disagree is measured.
        compile: run the part behind the cached one through `torch.compile` instead of the fused kernels; it
            recompiles for every layer, and was slower where it was measured (docs/performance.md).
        memory: number of masks per layer that are remembered with their answers.
    """

    compensate: bool = True
    target: str = "trained"
    ridge: float = 1e-3
    compensation_images: int = 1000
    statistics_images: int = 512
    cache_gib: float = 1.0
    method: str = "auto"
    dtype: str = "float32"
    compile: bool = False
    memory: int = 1024

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UserError(f"evaluation.target is {self.target!r}; expected one of {', '.join(TARGETS)}.")
        if self.dtype not in DTYPES:
            raise UserError(f"evaluation.dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}.")
        if self.memory < 0:
            raise UserError(f"evaluation.memory is {self.memory}; expected a number of masks, 0 for none.")
        check_numbers(self, ridge=POSITIVE, compensation_images=IMAGES, statistics_images=IMAGES)
        check_numbers(self, cache_gib=NOT_NEGATIVE, memory=IMAGES_OR_NONE)
