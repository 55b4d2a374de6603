"""The estimator against the exact gradient, by enumerating all masks of 3 filters."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from keepdrop.agent.learning.reinforce import (
    Reinforce,
    ReinforceSettings,
    advantages,
    leave_one_out_advantages,
    rank_advantages,
    reinforce_loss,
)
from keepdrop.agent.learning.rollout import Rollout
from keepdrop.agent.policies.distributions import IndependentBernoulli, MaskSample, SharedThresholdBernoulli
from keepdrop.agent.policies.set_policy import SetPolicy
from torch import Tensor

MASKS = torch.tensor(list(itertools.product([False, True], repeat=3)))
REWARDS = torch.tensor([-1.0, 0.3, 2.0, 0.1, -0.7, 0.9, 0.4, 5.0], dtype=torch.float64)
LOGITS = torch.tensor([0.4, -0.8, 1.1], dtype=torch.float64)
# The budget latent's threshold, put on a grid that integrates a Gaussian to far below the tolerance.
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(20)


def bernoulli_outcomes(logits: Tensor) -> tuple[MaskSample, Tensor, Tensor]:
    """All masks, their probabilities and rewards."""
    sample = MaskSample(MASKS, MASKS)
    return sample, IndependentBernoulli(logits).log_prob(sample).exp(), REWARDS


def budget_outcomes(parameters: Tensor) -> tuple[MaskSample, Tensor, Tensor]:
    """All (threshold node, mask) pairs: nodes carry the Gaussian's weight, masks their exact probability."""
    scores, location, log_scale = parameters[:3], parameters[3], parameters[4]
    nodes = (location + log_scale.exp() * torch.tensor(NODES)).detach()
    sample = MaskSample(MASKS.repeat(20, 1), MASKS.repeat(20, 1), nodes.repeat_interleave(8))
    conditional = torch.cat(
        [IndependentBernoulli(scores - node).log_prob(MaskSample(MASKS, MASKS)).exp() for node in nodes]
    )
    weights = torch.tensor(WEIGHTS / WEIGHTS.sum()).repeat_interleave(8)
    return sample, weights * conditional, REWARDS.repeat(20)


def bernoulli(parameters: Tensor) -> IndependentBernoulli:
    return IndependentBernoulli(parameters)


def budget(parameters: Tensor) -> SharedThresholdBernoulli:
    return SharedThresholdBernoulli(parameters[:3], parameters[3], parameters[4])


def exact_gradient_bernoulli() -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    (bernoulli_outcomes(logits)[1] @ REWARDS).backward()
    assert logits.grad is not None
    return logits.grad


def exact_gradient_budget(start: Tensor) -> Tensor:
    # Reparametrised: differentiating through the nodes needs no score function, so it is another route.
    parameters = start.clone().requires_grad_()
    value = torch.zeros((), dtype=torch.float64)
    for node, weight in zip(NODES, WEIGHTS / WEIGHTS.sum(), strict=True):
        threshold = parameters[3] + parameters[4].exp() * float(node)
        probability = IndependentBernoulli(parameters[:3] - threshold).log_prob(MaskSample(MASKS, MASKS)).exp()
        value = value + float(weight) * (probability @ REWARDS)
    value.backward()
    assert parameters.grad is not None
    return parameters.grad


def subset(sample: MaskSample, rows: Tensor) -> MaskSample:
    latents = None if sample.latents is None else sample.latents[rows]
    return MaskSample(sample.masks[rows], sample.raw[rows], latents)


def estimate(make: Callable[[Tensor], object], start: Tensor, sample: MaskSample, advantages_M: Tensor) -> Tensor:
    """One policy-gradient estimate from one batch, through the library's loss."""
    parameters = start.clone().requires_grad_()
    reinforce_loss(make(parameters), sample, advantages_M).backward()  # type: ignore[arg-type]
    assert parameters.grad is not None
    return -parameters.grad


def moments(make, start: Tensor, outcomes, baseline: str) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Exact mean and total variance of the estimator over every ordered pair of outcomes (M = 2)."""
    sample, probability, rewards = outcomes(start)
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    for i, j in itertools.product(range(len(rewards)), repeat=2):
        rows = torch.tensor([i, j])
        gradient = estimate(make, start, subset(sample, rows), advantages(rewards[rows], baseline))  # type: ignore[arg-type]
        mean += probability[i] * probability[j] * gradient
        square += probability[i] * probability[j] * gradient**2
    return mean, (square - mean**2).sum()


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_the_bernoulli_estimator_is_unbiased(baseline: str) -> None:
    mean, _ = moments(bernoulli, LOGITS, bernoulli_outcomes, baseline)
    torch.testing.assert_close(mean, exact_gradient_bernoulli(), rtol=1e-10, atol=1e-12)


def test_leave_one_out_is_quieter_than_none() -> None:
    _, quiet = moments(bernoulli, LOGITS, lambda logits: shifted(bernoulli_outcomes(logits)), "leave_one_out")
    _, loud = moments(bernoulli, LOGITS, lambda logits: shifted(bernoulli_outcomes(logits)), "none")
    assert quiet < loud / 2


def shifted(outcomes: tuple[MaskSample, Tensor, Tensor]) -> tuple[MaskSample, Tensor, Tensor]:
    return outcomes[0], outcomes[1], outcomes[2] + 5.0


def test_the_budget_estimator_is_unbiased() -> None:
    """The leave-one-out estimator is linear in pairs, so its mean over all pairs is computed in one batch.

    E[(r_i - r_j) g_i] over independent i, j = E[r g] - E[r] E[g]; both expectations are exact here.
    """
    start = torch.cat([LOGITS, torch.tensor([0.2, -0.3], dtype=torch.float64)])
    sample, probability, rewards = budget_outcomes(start)
    weighted = len(rewards) * probability
    with_rewards = estimate(budget, start, sample, weighted * rewards)
    scores = estimate(budget, start, sample, weighted)
    torch.testing.assert_close(scores, torch.zeros_like(scores), rtol=0, atol=1e-9)
    leave_one_out = with_rewards - (probability @ rewards) * scores
    torch.testing.assert_close(leave_one_out, exact_gradient_budget(start), rtol=1e-6, atol=1e-8)


def test_a_sampled_batch_agrees_with_the_pairwise_form(generator: torch.Generator) -> None:
    """The library's leave-one-out loss over M masks is the mean over ordered pairs of (r_i - r_j) g_i."""
    start = torch.cat([LOGITS, torch.tensor([0.2, -0.3], dtype=torch.float64)])
    sample = budget(start).sample(5, generator)
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    pairwise = torch.zeros_like(start)
    for i, j in itertools.permutations(range(5), 2):
        pairwise += estimate(budget, start, subset(sample, torch.tensor([i])), rewards[[i]] - rewards[[j]]) / 20
    library = estimate(budget, start, sample, leave_one_out_advantages(rewards))
    torch.testing.assert_close(library, pairwise, rtol=1e-9, atol=1e-12)


def test_a_mean_log_prob_would_be_n_times_too_small() -> None:
    sample, probability, rewards = bernoulli_outcomes(LOGITS)
    library = estimate(bernoulli, LOGITS, sample, 8 * probability * rewards)
    torch.testing.assert_close(library, exact_gradient_bernoulli())
    assert not torch.allclose(library / 3, exact_gradient_bernoulli())


def test_forcing_a_filter_does_not_bias_the_gradient() -> None:
    """The empty raw mask is scored as the forced one; with raw log-probabilities the gradient stays exact."""
    top = LOGITS.argmax()
    forced = MASKS.clone()
    forced[0, top] = True
    rewards = REWARDS.clone()
    rewards[0] = REWARDS[(forced[0] == MASKS).all(1)][0]
    logits = LOGITS.clone().requires_grad_()
    _, probability, _ = bernoulli_outcomes(logits)
    (probability @ rewards).backward()
    library = estimate(bernoulli, LOGITS, MaskSample(forced, MASKS), 8 * probability.detach() * rewards)
    torch.testing.assert_close(library, logits.grad)


def test_leave_one_out_by_hand() -> None:
    result = leave_one_out_advantages(torch.tensor([1.0, 2.0, 6.0]))
    assert result.tolist() == pytest.approx([1 - 4.0, 2 - 3.5, 6 - 1.5])


def test_ranks_by_hand_with_a_tie() -> None:
    assert rank_advantages(torch.tensor([-12.0, 0.5, 0.5, 9.0])).tolist() == pytest.approx([-1.0, 0.0, 0.0, 1.0])


def test_equal_rewards_teach_nothing() -> None:
    for baseline in ("rank", "leave_one_out"):
        assert advantages(torch.full((5,), 0.3), baseline).abs().max() < 1e-6  # type: ignore[arg-type]


def test_clip_bounds_the_advantages() -> None:
    assert advantages(torch.tensor([-12.0, 0.0, 0.0]), clip=1.0).tolist() == [-1.0, 1.0, 1.0]


@pytest.mark.parametrize("make", [leave_one_out_advantages, rank_advantages])
def test_one_mask_is_too_few(make: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="at least 2 masks per update; sample more masks"):
        make(torch.tensor([1.0]))


def test_unknown_baseline() -> None:
    with pytest.raises(ValueError, match="baseline is 'zscore', but it must be one of none, leave_one_out, rank"):
        advantages(torch.zeros(3), "zscore")  # type: ignore[arg-type]


def test_the_entropy_bonus_is_per_filter() -> None:
    sample = MaskSample(MASKS, MASKS)
    loss = reinforce_loss(IndependentBernoulli(torch.zeros(3)), sample, torch.zeros(8), entropy_weight=0.5)
    assert loss.item() == pytest.approx(-0.5 * math.log(2))


def test_the_gradient_is_clipped_and_reported_before() -> None:
    policy = SetPolicy(2)
    observation = {"weights": torch.randn(3, 4), "statistics": torch.randn(3, 2)}
    rollout = Rollout(observation, MaskSample(MASKS, MASKS, torch.zeros(8)), 1000 * REWARDS, {})
    learner = Reinforce(policy, ReinforceSettings(0.07, 0.01, "leave_one_out", clip=None, max_grad_norm=0.5))
    metrics = learner.update(rollout)
    after = math.sqrt(sum(p.grad.square().sum().item() for p in policy.parameters() if p.grad is not None))
    assert metrics["gradient_norm"] > 100
    assert after == pytest.approx(0.5, rel=1e-3)
    assert metrics["reward_max"] == 5000.0
    assert metrics["kept_mean"] == pytest.approx(0.5)
