"""Mask distributions: sums, greedy decisions, no empty mask, repeatable samples."""

import itertools
import math

import pytest
import torch
from keepdrop.agent.policies.distributions import IndependentBernoulli, MaskSample, SharedThresholdBernoulli, top_mask


def budget(scores: list[float], location: float = 0.3, scale: float = 1.5) -> SharedThresholdBernoulli:
    return SharedThresholdBernoulli(torch.tensor(scores), torch.tensor(location), torch.tensor(math.log(scale)))


def all_masks(n_filters: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=n_filters)))


def test_log_prob_is_the_sum_over_filters_not_the_mean() -> None:
    masks = torch.tensor([[True, False, True]])
    log_prob = IndependentBernoulli(torch.tensor([0.0, 0.0, 0.0])).log_prob(MaskSample(masks, masks))
    assert log_prob.item() == pytest.approx(3 * math.log(0.5))


def test_bernoulli_probabilities_sum_to_one() -> None:
    masks = all_masks(3)
    log_prob = IndependentBernoulli(torch.tensor([0.4, -1.0, 2.0])).log_prob(MaskSample(masks, masks))
    assert log_prob.exp().sum().item() == pytest.approx(1.0)


def test_budget_log_prob_by_hand() -> None:
    masks = torch.tensor([[True, False]])
    sample = MaskSample(masks, masks, torch.tensor([1.0]))
    latent = -0.5 * ((1.0 - 0.3) / 1.5) ** 2 - math.log(1.5) - 0.5 * math.log(2 * math.pi)
    kept = -math.log1p(math.exp(-(2.0 - 1.0)))
    dropped = -math.log1p(math.exp(-0.5 - 1.0))
    log_prob = budget([2.0, -0.5]).log_prob(sample).item()
    assert log_prob == pytest.approx(latent + kept + dropped, rel=1e-5)


def test_budget_log_prob_needs_latents() -> None:
    masks = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="needs the sampled latents"):
        budget([0.0, 0.0]).log_prob(MaskSample(masks, masks))


def test_entropy_by_enumeration() -> None:
    distribution = IndependentBernoulli(torch.tensor([0.4, -1.0, 2.0]))
    masks = all_masks(3)
    log_prob = distribution.log_prob(MaskSample(masks, masks))
    assert distribution.entropy().item() == pytest.approx(-(log_prob.exp() * log_prob).sum().item(), rel=1e-5)


def test_budget_entropy_and_keep_probability_by_sampling(generator: torch.Generator) -> None:
    distribution = budget([1.0, -0.5, 0.2])
    sample = distribution.sample(40_000, generator)
    assert distribution.entropy().item() == pytest.approx(-distribution.log_prob(sample).mean().item(), abs=0.03)
    torch.testing.assert_close(distribution.keep_probability(), sample.raw.float().mean(0), atol=0.01, rtol=0)


def test_extreme_logits_stay_finite() -> None:
    distribution = IndependentBernoulli(torch.tensor([200.0, -200.0], requires_grad=True))
    distribution.entropy().backward()
    assert distribution.entropy().item() == 0.0
    assert torch.isfinite(distribution.logits.grad).all()  # type: ignore[arg-type]


def test_greedy_keeps_positive_logits_only() -> None:
    assert IndependentBernoulli(torch.tensor([0.0, 1e-3, -1e-3])).greedy().tolist() == [False, True, False]
    assert budget([0.2, 0.4], location=0.3).greedy().tolist() == [False, True]


@pytest.mark.parametrize("logits", [[-3.0, -1.0, -2.0], [0.0, 0.0, 0.0]])
def test_greedy_is_never_empty(logits: list[float]) -> None:
    assert IndependentBernoulli(torch.tensor(logits)).greedy().sum() == 1
    assert budget(logits, location=5.0).greedy().sum() == 1


def test_a_sampled_mask_is_never_empty_and_its_raw_draw_is_kept(generator: torch.Generator) -> None:
    distribution = IndependentBernoulli(torch.tensor([-3.0, -2.0, -4.0]))
    sample = distribution.sample(200, generator)
    empty = ~sample.raw.any(1)
    assert empty.any()
    assert sample.masks[empty].tolist() == [[False, True, False]] * int(empty.sum())
    assert torch.equal(sample.masks[~empty], sample.raw[~empty])
    expected = IndependentBernoulli(distribution.logits).log_prob(MaskSample(sample.raw, sample.raw))
    assert torch.equal(distribution.log_prob(sample), expected)


@pytest.mark.parametrize("make", [IndependentBernoulli, lambda logits: budget(logits.tolist())])
def test_samples_come_from_the_generator_only(make) -> None:  # type: ignore[no-untyped-def]
    distribution = make(torch.zeros(10))
    torch.manual_seed(1)
    first = distribution.sample(8, torch.Generator().manual_seed(5))
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second = distribution.sample(8, torch.Generator().manual_seed(5))
    assert torch.equal(first.masks, second.masks)
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_budget_latent_explores_the_count(generator: torch.Generator) -> None:
    independent = IndependentBernoulli(torch.zeros(256)).sample(500, generator).masks.float().mean(1)
    shared = budget([0.0] * 256, location=0.0, scale=1.0).sample(500, generator).masks.float().mean(1)
    assert independent.std() < 0.05 < 0.15 < shared.std()


def test_top_mask_breaks_ties_by_position() -> None:
    assert top_mask(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("n_keep", [0, 4])
def test_top_mask_refuses_impossible_counts(n_keep: int) -> None:
    with pytest.raises(ValueError, match=f"n_keep is {n_keep}, but of 3 filters between 1 and 3"):
        top_mask(torch.zeros(3), n_keep)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="logits are not finite; lower the learning rate"):
        IndependentBernoulli(torch.tensor([0.0, float("nan")]))
