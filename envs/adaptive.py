"""Fewer images a mask: spend them chunk by chunk, and stop for a mask once its order among the others is settled.

Images that the dense network is nearly undecided about are the ones whose answers change. So images are divided into
strata by the dense network's margin (largest logit minus the next), close calls are drawn far more often than their
share, and every mean is put together from the strata's means by their true sizes (Neyman 1934): no mask is favoured on
the average, and far fewer images say the same.

After each look at n of B images, masks i and j are compared by their rewards on these images. By the delta method the
difference of two rewards is a mean over images of what each image contributes to it, so common images cancel what both
masks get right or wrong, and its standard error s follows from the contributions' variance in each stratum, with the
correction for drawing without replacement. The pair is

- settled, when |R_i - R_j| > z s. z is the two-sided normal quantile for `error` divided by the number of looks before
  the last (Bonferroni), so that a pair is settled in the wrong order, against all B images, with a probability of at
  most `error`. Normality is an approximation; one imagined contrary image a mask, spread over the strata, keeps s
  honest when few differ (after Agresti and Coull 1998). A test measures the rate by simulation, also with margins that
  say nothing;
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

from ..errors import UserError

Answers = Callable[[Tensor, Tensor], Tensor]
"""Masks (M',) and images (B',), both by index -> right or wrong, (M', B') bool, or points of scores in [0, 1]."""

Worth = Callable[[int, float, float], float]
"""Mask, base accuracy, its accuracy -> reward."""


STRATA = (0.1, 0.2, 0.3, 0.5, 1.0)
"""Upper bounds of the strata, as fractions of the images in the order of their margins."""

SHARES = (0.45, 0.22, 0.14, 0.1, 0.09)
"""Of the images that are spent, by stratum: about the root of how often an answer changes there (Neyman 1934)."""

MIN_A_STRATUM = 2


@dataclass(frozen=True)
class AdaptiveSettings:
    """When a mask has seen enough images.

    Args:
        first: images of the first look; with strata a few more, here and later.
        growth: how many times as many images each later look has in all.
        error: chance, at most, of settling a pair of masks in the wrong order.
        resolution: standard error, in units of the spread of the rewards, below which a pair is too close to matter.
    """

    first: int = 64
    growth: float = 1.4
    error: float = 0.1
    resolution: float = 2.2

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
        accuracy: the mask's on all images as estimated from these, exact once all were seen, (M,) float64.
        base_accuracy: the dense network's, estimated from the same images, (M,) float64.
        order: sign of R_i - R_j for pairs that were settled before the last look, 0 for others, (M, M) int8.
    """

    n_images: Tensor
    accuracy: Tensor
    base_accuracy: Tensor
    order: Tensor


def strata_of(margins: Tensor) -> Tensor:
    """Stratum of each image, (B,) int64, by the dense network's margins (B,): 0 holds the closest calls.

    Pruning turns over close calls: of all answers that change, four in five are among the tenth of the images with the
    smallest margins (ResNet-20 on CIFAR-10, all stages).
    """
    rank = torch.empty(len(margins), dtype=torch.int64)
    rank[margins.argsort(stable=True)] = torch.arange(len(margins))
    bounds = torch.tensor(STRATA[:-1], dtype=torch.float64) * len(margins)
    return torch.bucketize(rank.double(), bounds, right=True)


def judge_in_turn(
    answers: Answers,
    worth: Worth,
    base: Tensor,
    same: Tensor,
    order: Tensor,
    settings: AdaptiveSettings,
    unit: int = 1,
    strata: Tensor | None = None,
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
        strata: of the images in `order` (`strata_of`); None spends them as they come.
    """
    n_masks, sample = len(same), _Sample(strata if strata is not None else torch.zeros_like(order))
    looks = settings.looks(len(order))
    z = NormalDist().inv_cdf(1 - settings.error / max(1, len(looks) - 1) / 2)
    flags, base_scores = torch.zeros(n_masks, len(order), dtype=base.dtype), base.double() / unit
    n_images, values = torch.zeros(n_masks, dtype=torch.int64), torch.zeros(n_masks, dtype=torch.float64)
    accuracy, base_accuracy = torch.zeros_like(values), torch.zeros_like(values)
    called, closed = torch.zeros_like(same, dtype=torch.int8), same.clone()
    active, seen = torch.arange(n_masks), order.new_zeros(0)
    for n in looks:
        sample.grow(n)
        new = sample.seen[~torch.isin(sample.seen, seen)]
        seen = sample.seen
        flags[active[:, None], new] = answers(active, order[new])
        n_images[active] = len(seen)
        rows, dense = flags[active][:, seen].double() / unit, base_scores[seen]
        accuracy[active], base_accuracy[active] = sample.mean(rows), sample.mean(dense)
        if n == len(order):
            break
        values[active], contributions = _contributions(active, rows, dense, sample, worth)
        error = _standard_errors(contributions, sample)
        difference = values[active, None] - values[None, active]
        apart = difference.abs() > z * error
        pairs = (active[:, None], active[None, :])
        called[pairs] += (difference.sign() * (apart & ~closed[pairs])).to(torch.int8)
        closed[pairs] |= apart | (error <= settings.resolution * float(values.std(correction=0)))
        active = active[~closed[pairs].all(1)]
        if not len(active):
            break
    return Verdict(n_images, accuracy, base_accuracy, called)


class _Sample:
    """The images seen so far: of each stratum as many as it is due, without replacement."""

    def __init__(self, strata: Tensor) -> None:
        self._members = [(strata == stratum).nonzero().flatten() for stratum in strata.unique().tolist()]
        self._total = len(strata)
        found = strata.unique().tolist()
        shares = torch.tensor([SHARES[each] for each in found] if len(found) > 1 else [1.0], dtype=torch.float64)
        self._sizes = torch.tensor([len(each) for each in self._members])
        self._shares = shares / shares.sum()
        self.grow(0)

    def grow(self, n_images: int) -> None:
        """See `n_images` in all, or a few more."""
        self._counts = self._due(n_images)
        taken = [each[:count] for each, count in zip(self._members, self._counts.tolist(), strict=True)]
        self.seen = torch.cat(taken)

    def _due(self, n_images: int) -> Tensor:
        """By shares; where a stratum has no more, the others get its part."""
        low, high = 0.0, self._total / float(self._shares.min())
        for _ in range(60):
            middle = (low + high) / 2
            enough = float(torch.minimum(middle * self._shares, self._sizes.double()).sum()) >= n_images
            low, high = (low, middle) if enough else (middle, high)
        due = (high * self._shares - 1e-6).ceil().long()
        return torch.minimum(due.clamp_min(MIN_A_STRATUM if n_images else 0), self._sizes)

    def mean(self, rows: Tensor) -> Tensor:
        """Of rows (..., n) in [0, 1] over all images, seen or not; exact if all were seen."""
        if len(self.seen) == self._total:
            return rows.sum(-1) / self._total
        parts = rows.split(self._counts.tolist(), -1)
        weighted = zip(parts, self._sizes.tolist(), strict=True)
        return torch.stack([part.mean(-1) * (size / self._total) for part, size in weighted]).sum(0).clamp(0, 1)

    def parts(self) -> list[tuple[slice, float, float]]:
        """Of each stratum with unseen images: where its seen ones are, their part in the variance, one image's odds."""
        odds = self._shares**2 / (self._shares**2).sum()
        found, end = [], 0
        for size, count, odd in zip(self._sizes.tolist(), self._counts.tolist(), odds.tolist(), strict=True):
            start, end = end, end + count
            if count < size:
                scale = (size / self._total) ** 2 * (1 - count / size) / count
                found.append((slice(start, end), scale, odd / count))
        return found


def _contributions(
    masks: Tensor, scores: Tensor, base: Tensor, sample: _Sample, worth: Worth
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Rewards (M,), and what each image adds to them (M, n) with the slope of each reward in the accuracy (M,).

    Scores (M, n) float64 and the dense network's (n,) lie in [0, 1].
    """
    n, p = scores.shape[1], float(sample.mean(base))
    values, rows, slopes = [], [], []
    for mask, row in zip(masks.tolist(), scores, strict=True):
        q, step = float(sample.mean(row)), 1 / n
        values.append(worth(mask, p, q))
        up, down = min(q + step, 1.0), max(q - step, 0.0)
        slope = (worth(mask, p, up) - worth(mask, p, down)) / (up - down)
        up, down = min(p + step, 1.0), max(p - step, 0.0)
        base_slope = (worth(mask, up, q) - worth(mask, down, q)) / (up - down)
        rows.append(slope * row + base_slope * base)
        slopes.append(slope)
    return torch.tensor(values, dtype=torch.float64), (torch.stack(rows), torch.tensor(slopes, dtype=torch.float64))


def _standard_errors(contributions: tuple[Tensor, Tensor], sample: _Sample) -> Tensor:
    """Of all differences of rewards, (M, M)."""
    rows, slopes = contributions
    contrary = slopes[:, None] ** 2 + slopes[None, :] ** 2
    total = torch.zeros_like(contrary)
    for places, scale, odds in sample.parts():
        covariance = torch.atleast_2d(torch.cov(rows[:, places]))
        own = covariance.diagonal()
        variance = (own[:, None] + own[None, :] - 2 * covariance).clamp_min(0)
        total += scale * (variance + contrary * odds)
    return total.sqrt()
