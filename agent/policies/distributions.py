"""Distributions over keep masks: independent Bernoullis, and Bernoullis with a shared sampled threshold.

Shape suffixes: M masks, N filters, K quadrature points.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

N_POINTS = 32


@dataclass(frozen=True)
class MaskSample:
    """M sampled masks.

    Attributes:
        masks: (M, N) bool, what is acted on; no row is empty.
        raw: (M, N) bool, what was drawn. Its log-probability is the one that counts: forcing a filter into an
            empty mask is done after sampling, as a part of the environment, so that the gradient stays exact.
        latents: (M,), the latent of each mask, or None for a distribution without one.
    """

    masks: Tensor
    raw: Tensor
    latents: Tensor | None = None


class MaskDistribution(Protocol):
    """What a policy returns: a distribution over keep masks of N filters."""

    @property
    def logits(self) -> Tensor:
        """The keep logits at the distribution's centre; greedy keeps what is above 0."""

    def sample(self, n_masks: int, generator: torch.Generator) -> MaskSample:
        """Draw n_masks masks from the generator, and only from it."""

    def log_prob(self, sample: MaskSample) -> Tensor:
        """The joint log-probability (M,): the SUM over the filters, and over the latent where there is one."""

    def entropy(self) -> Tensor:
        """The joint entropy in nats, a scalar."""

    def keep_probability(self) -> Tensor:
        """The marginal probability (N,) of keeping each filter."""

    def greedy(self) -> Tensor:
        """The mask (N,), bool, of the filters whose logit is above 0; never empty."""


class IndependentBernoulli:
    """One independent Bernoulli per filter, as in the paper.

    It hardly explores HOW MANY filters are kept: the count spreads with sqrt(N) only.

    Args:
        logits_N: keep logits.
    """

    def __init__(self, logits_N: Tensor) -> None:
        self.logits = _checked(logits_N)

    def sample(self, n_masks: int, generator: torch.Generator) -> MaskSample:
        """Draw n_masks masks."""
        probability_MN = torch.sigmoid(self.logits.detach()).expand(n_masks, -1)
        raw_MN = _uniform(probability_MN, generator) < probability_MN
        return MaskSample(_never_empty(raw_MN, self.logits), raw_MN)

    def log_prob(self, sample: MaskSample) -> Tensor:
        """The log-probability (M,), summed over the filters."""
        return _log_bernoulli(self.logits.expand(sample.raw.shape), sample.raw)

    def entropy(self) -> Tensor:
        """The entropy in nats, summed over the filters."""
        return _bernoulli_entropy(self.logits).sum()

    def keep_probability(self) -> Tensor:
        """The probability (N,) of keeping each filter."""
        return torch.sigmoid(self.logits)

    def greedy(self) -> Tensor:
        """The mask (N,) of the logits above 0; never empty."""
        return _greedy(self.logits)


class SharedThresholdBernoulli:
    """Bernoullis that share one sampled threshold: z ~ Normal(location, exp(log_scale)), logit_i = score_i - z.

    What is shared is z: each mask draws its own, and all filters of the mask are compared with it. It acts as a latent
    budget (`exploration="budget"`): moving it moves all filters at once, so the number kept is explored as widely as
    `log_scale` says, whatever N is, while the scores say which filters go first. log_prob is the joint one of
    (z, mask), whose score function is as unbiased as the marginal one. No source; not in the paper.

    Args:
        scores_N: one score per filter.
        location: mean of the threshold, a scalar tensor.
        log_scale: log of its standard deviation, a scalar tensor.
    """

    def __init__(self, scores_N: Tensor, location: Tensor, log_scale: Tensor) -> None:
        self.scores_N = _checked(scores_N)
        self.location = location
        self.log_scale = log_scale

    @property
    def logits(self) -> Tensor:
        """The keep logits (N,) at the mean threshold."""
        return self.scores_N - self.location

    def sample(self, n_masks: int, generator: torch.Generator) -> MaskSample:
        """Draw n_masks thresholds, and one mask at each."""
        with torch.no_grad():
            latents_M = self.location + self.log_scale.exp() * _normal(self.scores_N, n_masks, generator)
            probability_MN = torch.sigmoid(self.scores_N - latents_M[:, None])
        raw_MN = _uniform(probability_MN, generator) < probability_MN
        return MaskSample(_never_empty(raw_MN, self.scores_N), raw_MN, latents_M)

    def log_prob(self, sample: MaskSample) -> Tensor:
        """The joint log-probability (M,) of threshold and mask, summed over the filters.

        Raises:
            ValueError: a sample without latents.
        """
        if sample.latents is None:
            raise ValueError("a shared threshold's log-probability needs the sampled latents, and this sample has none")
        standard_M = (sample.latents - self.location) * torch.exp(-self.log_scale)
        latent_M = -0.5 * standard_M**2 - self.log_scale - 0.5 * math.log(2 * math.pi)
        return latent_M + _log_bernoulli(self.scores_N - sample.latents[:, None], sample.raw)

    def entropy(self) -> Tensor:
        """The joint entropy in nats of threshold and mask: H(z) + E_z[sum_i H(mask_i | z)]."""
        points_K, weights_K = self._quadrature()
        conditional_K = _bernoulli_entropy(self.scores_N - points_K[:, None]).sum(-1)
        return 0.5 * math.log(2 * math.pi * math.e) + self.log_scale + weights_K @ conditional_K

    def keep_probability(self) -> Tensor:
        """The marginal probability (N,) of keeping each filter, over all thresholds."""
        points_K, weights_K = self._quadrature()
        return weights_K @ torch.sigmoid(self.scores_N - points_K[:, None])

    def greedy(self) -> Tensor:
        """The mask (N,) of the scores above the mean threshold; never empty."""
        return _greedy(self.logits)

    def _quadrature(self) -> tuple[Tensor, Tensor]:
        points, weights = np.polynomial.hermite_e.hermegauss(N_POINTS)
        points_K = self.scores_N.new_tensor(points)
        return self.location + self.log_scale.exp() * points_K, self.scores_N.new_tensor(weights / weights.sum())


def top_mask(scores_N: Tensor, n_keep: int) -> Tensor:
    """The mask (N,), bool, of the n_keep highest scores; of equal scores the first ones win.

    Raises:
        ValueError: n_keep outside 1 to N.
    """
    if not 1 <= n_keep <= len(scores_N):
        raise ValueError(
            f"n_keep is {n_keep}, but of {len(scores_N)} filters between 1 and {len(scores_N)} can be kept"
        )
    order_N = torch.argsort(scores_N.detach(), descending=True, stable=True)
    mask_N = torch.zeros(len(scores_N), dtype=torch.bool, device=scores_N.device)
    mask_N[order_N[:n_keep]] = True
    return mask_N


def _checked(logits_N: Tensor) -> Tensor:
    if logits_N.ndim != 1 or len(logits_N) == 0:
        raise ValueError(f"one logit per filter, shape (N,), was expected, but the shape is {tuple(logits_N.shape)}")
    if not torch.isfinite(logits_N).all():
        raise ValueError("the policy's logits are not finite; lower the learning rate or check the observation for NaN")
    return logits_N


def _uniform(like_MN: Tensor, generator: torch.Generator) -> Tensor:
    # float64 and drawn where the generator lives: the same masks on every device.
    drawn = torch.rand(like_MN.shape, generator=generator, device=generator.device, dtype=torch.float64)
    return drawn.to(like_MN.device)


def _normal(like: Tensor, n_masks: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(n_masks, generator=generator, device=generator.device, dtype=torch.float64)
    return drawn.to(device=like.device, dtype=like.dtype)


def _log_bernoulli(logits_MN: Tensor, masks_MN: Tensor) -> Tensor:
    return -binary_cross_entropy_with_logits(logits_MN, masks_MN.to(logits_MN.dtype), reduction="none").sum(-1)


def _bernoulli_entropy(logits: Tensor) -> Tensor:
    # H = softplus(l) - l sigmoid(l), which stays finite where p log p would not.
    return softplus(logits) - logits * torch.sigmoid(logits)


def _greedy(logits_N: Tensor) -> Tensor:
    # Not `Bernoulli.mode`: that is nan at a logit of 0.
    return (logits_N.detach() > 0) | top_mask(logits_N, 1)


def _never_empty(raw_MN: Tensor, logits_N: Tensor) -> Tensor:
    return raw_MN | (~raw_MN.any(-1, keepdim=True) & top_mask(logits_N, 1))
