"""Fewer images a mask: spend them chunk by chunk, and stop for a mask once its order among the others is settled.

After each look at n of B images, masks i and j are compared by their rewards on these images. By the delta method the
difference of two rewards is a mean over images of what each image contributes to it, so common images cancel what both
masks get right or wrong, and its standard error s follows from the contributions' variance, with the correction for
drawing without replacement. The pair is

- settled, when |R_i - R_j| > z s. z is the two-sided normal quantile for `error` divided by the number of looks before
  the last (Bonferroni), so that a pair is settled in the wrong order, against all B images, with a probability of at
  most `error`. Normality is an approximation; one imagined contrary image a mask keeps s honest when few differ
  (after Agresti and Coull 1998). A test measures the rate by simulation. All of it holds for scores between 0 and 1 as
  for right and wrong: a mean of n of them has the variance the sample shows, and no contrary image counts more than 1;
- too close to matter, when s is below `resolution` times the spread of all rewards.

A mask stops when each of its pairs is one of the two. At the last look all B images are known and nothing is guessed.

Shapes: M masks, B images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ..rewards.errors import UserError

Answers = Callable[[Tensor, Tensor], Tensor]
"""Masks (M',) and images (B',), both by index -> right or wrong, (M', B') bool, or points of scores in [0, 1]."""

Worth = Callable[[int, float, float], float]
"""Mask, base accuracy, its accuracy -> reward."""


@dataclass(frozen=True)
class AdaptiveSettings:
    """When a mask has seen enough images.

    Args:
        first: images of the first look.
        growth: how many times as many images each later look has in all.
        error: chance, at most, of settling a pair of masks in the wrong order.
        resolution: standard error, in units of the spread of the rewards, below which a pair is too close to matter.
    """

    first: int = 64
    growth: float = 2.0
    error: float = 0.1
    resolution: float = 0.7

    def __post_init__(self) -> None:
        if self.first < 16 or not self.growth > 1 or not 0 < self.error < 1 or self.resolution < 0:
            raise UserError(
                f"Adaptive evaluation was given first={self.first}, growth={self.growth}, error={self.error}, "
                f"resolution={self.resolution}; expected 16 images or more at first, a growth above 1, an error in "
                "(0, 1) and a resolution of 0 or more."
            )

    def looks(self, n_images: int) -> list[int]:
        """Numbers of images at which is looked, the last one all of them."""
        found, size = [], float(self.first)
        while round(size) < n_images:
            found.append(round(size))
            size *= self.growth
        return [*found, n_images]


@dataclass(frozen=True)
class Verdict:
    """What was found out, mask by mask.

    Attributes:
        n_images: images spent on each mask, (M,) int64.
        correct: of these the mask got right, or its points on them, (M,) int64.
        base_correct: of these the dense network got right, or its points, (M,) int64.
        order: sign of R_i - R_j for pairs that were settled before the last look, 0 for others, (M, M) int8.
    """

    n_images: Tensor
    correct: Tensor
    base_correct: Tensor
    order: Tensor


def judge_in_turn(
    answers: Answers,
    worth: Worth,
    base: Tensor,
    same: Tensor,
    order: Tensor,
    settings: AdaptiveSettings,
    unit: int = 1,
) -> Verdict:
    """Spend images on M masks until their order is settled.

    Args:
        answers: evaluates masks on images.
        worth: reward of a mask at given accuracies; may bend, as the delta method's slopes are taken where it stands.
        base: what the dense network gets right of the images in `order`, (B,) bool, or its points.
        same: pairs of masks that are one and the same, (M, M) bool.
        order: images in the order in which they are spent, (B,) int64; it must be random.
        settings: when to stop.
        unit: points of a perfect answer.
    """
    n_masks, looks = len(same), settings.looks(len(order))
    z = NormalDist().inv_cdf(1 - settings.error / max(1, len(looks) - 1) / 2)
    flags, base_scores = torch.zeros(n_masks, len(order), dtype=base.dtype), base.float() / unit
    n_images, values = torch.zeros(n_masks, dtype=torch.int64), torch.zeros(n_masks, dtype=torch.float64)
    called, closed = torch.zeros_like(same, dtype=torch.int8), same.clone()
    active, seen = torch.arange(n_masks), 0
    for n in looks:
        flags[active, seen:n] = answers(active, order[seen:n])
        n_images[active], seen = n, n
        if n == len(order):
            break
        rows = flags[active, :n].double() / unit
        values[active], contributions = _contributions(active, rows, base_scores[:n], worth)
        error = _standard_errors(contributions, 1 - n / len(order))
        difference = values[active, None] - values[None, active]
        apart = difference.abs() > z * error
        pairs = (active[:, None], active[None, :])
        called[pairs] += (difference.sign() * (apart & ~closed[pairs])).to(torch.int8)
        closed[pairs] |= apart | (error <= settings.resolution * float(values.std(correction=0)))
        active = active[~closed[pairs].all(1)]
        if not len(active):
            break
    # What a mask did not see is 0 in its flags.
    base_correct = torch.stack([base[:n].sum() for n in n_images])
    return Verdict(n_images, flags.sum(1), base_correct, called)


def _contributions(masks: Tensor, scores: Tensor, base: Tensor, worth: Worth) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Rewards (M,), and what each image adds to them (M, n) with the slope of each reward in the accuracy (M,).

    Scores (M, n) float64 and the dense network's (n,) lie in [0, 1].
    """
    n, p = scores.shape[1], float(base.double().mean())
    values, rows, slopes = [], [], []
    for mask, row in zip(masks.tolist(), scores, strict=True):
        q, step = float(row.mean()), 1 / n
        values.append(worth(mask, p, q))
        up, down = min(q + step, 1.0), max(q - step, 0.0)
        slope = (worth(mask, p, up) - worth(mask, p, down)) / (up - down)
        up, down = min(p + step, 1.0), max(p - step, 0.0)
        base_slope = (worth(mask, up, q) - worth(mask, down, q)) / (up - down)
        rows.append(slope * row + base_slope * base)
        slopes.append(slope)
    return torch.tensor(values, dtype=torch.float64), (torch.stack(rows), torch.tensor(slopes, dtype=torch.float64))


def _standard_errors(contributions: tuple[Tensor, Tensor], left: float) -> Tensor:
    """Of all differences of rewards, (M, M); `left` is the fraction of images not yet seen."""
    rows, slopes = contributions
    n = rows.shape[1]
    covariance = torch.atleast_2d(torch.cov(rows))
    own = covariance.diagonal()
    variance = (own[:, None] + own[None, :] - 2 * covariance).clamp_min(0)
    imagined = (slopes[:, None] ** 2 + slopes[None, :] ** 2) / n
    return ((variance + imagined) / n * left).sqrt()
