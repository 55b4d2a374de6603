"""How far a regression stays with the weights it began with."""

import torch
from keepdrop.envs.repair.patches import ENOUGH, chosen_ridge, regress

RIDGE = 1e-3


def noisy(n_samples: int, n_weights: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs (S, K), outputs (S, O) with noise, and weights (K, O) near those behind them."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n_weights, 5, generator=generator) / n_weights**0.5
    inputs = torch.randn(n_samples, n_weights, generator=generator)
    noise = 0.5 * torch.randn(n_samples, 5, generator=generator)
    return inputs, inputs @ weights + noise, weights + 0.02 * torch.randn(n_weights, 5, generator=generator)


def error(weights: torch.Tensor, inputs: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((inputs @ weights.float() - wanted).square().mean())


def test_as_many_samples_as_weights_do_not_spoil_them() -> None:
    inputs, wanted, prior = noisy(62)
    ridge = chosen_ridge(inputs, wanted, prior, RIDGE, intercept=False)
    fresh = torch.randn(2000, 60, generator=torch.Generator().manual_seed(5))
    known = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) / 60**0.5
    fitted, careful = (regress(inputs, wanted, prior, each, intercept=False) for each in (RIDGE, ridge))
    assert ridge > RIDGE
    assert error(careful, fresh, fresh @ known) < 0.25 * error(fitted, fresh, fresh @ known)
    assert error(careful, fresh, fresh @ known) < 1.5 * error(prior, fresh, fresh @ known)


def test_enough_samples_are_left_to_the_ridge() -> None:
    inputs, wanted, prior = noisy(ENOUGH * 60)
    assert chosen_ridge(inputs, wanted, prior, RIDGE, intercept=True) == RIDGE
