"""The control variate against the exact gradient, by enumerating all masks of 3 filters."""

import itertools

import pytest
import torch
from keepdrop.agent.learning.control_variate import LinearControl
from keepdrop.agent.learning.reinforce import Reinforce, ReinforceSettings, policy_loss
from keepdrop.agent.learning.rollout import Rollout
from keepdrop.agent.learning.trainer import AgentSettings
from keepdrop.agent.policies.distributions import IndependentBernoulli, MaskSample, SharedThresholdBernoulli
from keepdrop.agent.policies.set_policy import SetPolicy
from torch import Tensor

MASKS = torch.tensor(list(itertools.product([False, True], repeat=3)))
LOGITS = torch.tensor([0.4, -0.8, 1.1], dtype=torch.float64)
WORTH = torch.tensor([0.3, -0.5, 0.9], dtype=torch.float64)
REWARDS = MASKS.double() @ WORTH + torch.tensor([0.1, 0.0, -0.1, 0.05, 0.0, 0.1, 0.0, -0.05], dtype=torch.float64)
OBSERVATION = {"weights": torch.arange(12.0).view(3, 4), "statistics": torch.tensor([[0.2], [0.1], [0.7]])}


def exact_gradient() -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    sample = MaskSample(MASKS, MASKS)
    (IndependentBernoulli(logits).log_prob(sample).exp() @ REWARDS).backward()
    assert logits.grad is not None
    return logits.grad


def moments(weights: Tensor | None, baseline: str) -> tuple[Tensor, Tensor]:
    """Exact mean and total variance of the estimator over every ordered pair of masks."""
    probability = IndependentBernoulli(LOGITS).log_prob(MaskSample(MASKS, MASKS)).exp()
    settings = ReinforceSettings(baseline=baseline, entropy_weight=0.0)
    mean, square = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for i, j in itertools.product(range(8), repeat=2):
        pair = MASKS[[i, j]]
        logits = LOGITS.clone().requires_grad_()
        loss = policy_loss(IndependentBernoulli(logits), MaskSample(pair, pair), REWARDS[[i, j]], settings, weights)
        loss.backward()
        assert logits.grad is not None
        mean -= probability[i] * probability[j] * logits.grad
        square += probability[i] * probability[j] * logits.grad**2
    return mean, (square - mean**2).sum()


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
@pytest.mark.parametrize("weights", [WORTH, torch.tensor([-2.0, 3.0, 0.5], dtype=torch.float64)])
def test_unbiased_for_any_weights(weights: Tensor, baseline: str) -> None:
    torch.testing.assert_close(moments(weights, baseline)[0], exact_gradient(), rtol=1e-10, atol=1e-12)


def test_good_weights_make_it_quieter() -> None:
    assert moments(WORTH, "leave_one_out")[1] < 0.2 * moments(None, "leave_one_out")[1]


def test_unbiased_with_a_sampled_budget() -> None:
    """The added gradient is that of the expected prediction, over threshold and mask."""
    parameters = torch.cat([LOGITS, torch.tensor([0.2, -0.3], dtype=torch.float64)])
    generator, total = torch.Generator().manual_seed(0), torch.zeros(5, dtype=torch.float64)
    settings, n_masks = ReinforceSettings(baseline="none", entropy_weight=0.0), 4000
    for _ in range(25):
        start = parameters.clone().requires_grad_()
        budget = SharedThresholdBernoulli(start[:3], start[3], start[4])
        sample = budget.sample(n_masks, generator)
        # A reward that is the prediction leaves no advantage: what remains must be the score function's mean.
        rewards = sample.raw.double() @ WORTH
        plain, controlled = (policy_loss(budget, sample, rewards, settings, w) for w in (None, WORTH))
        (gradient,) = torch.autograd.grad(plain - controlled, start)
        total += gradient / 25
    assert total.abs().max() < 0.01


def test_learns_its_weights_from_earlier_masks() -> None:
    control = LinearControl(ridge=1e-6)
    assert control.weights(OBSERVATION).tolist() == [0.0, 0.0, 0.0]
    by_rank = torch.tensor([0.2, 0.1, 0.3], dtype=torch.float64)  # linear in the ranks 0, -2/3, 2/3 and 1
    control.add(OBSERVATION, MASKS, MASKS.double() @ by_rank + 5)
    torch.testing.assert_close(control.weights(OBSERVATION), by_rank, rtol=1e-3, atol=1e-3)


def test_the_learner_uses_masks_of_earlier_updates_only_and_resumes() -> None:
    torch.manual_seed(0)
    policy = SetPolicy(1)
    learner = Reinforce(policy, ReinforceSettings(control_variate=True))
    rollout = Rollout(OBSERVATION, MaskSample(MASKS, MASKS, torch.zeros(8)), REWARDS, {})
    plain = Reinforce(SetPolicy(1), ReinforceSettings())
    plain.policy.load_state_dict(policy.state_dict())
    # The first update knows no earlier mask, so it is the plain one.
    assert learner.update(rollout)["gradient_norm"] == pytest.approx(plain.update(rollout)["gradient_norm"])
    assert learner.update(rollout)["gradient_norm"] != pytest.approx(plain.update(rollout)["gradient_norm"])
    other = Reinforce(policy, ReinforceSettings(control_variate=True))
    other.load_state_dict(learner.state_dict())
    assert other.control is not None and learner.control is not None
    torch.testing.assert_close(other.control.weights(OBSERVATION), learner.control.weights(OBSERVATION))


@pytest.mark.parametrize("options", [{"baseline": "rank"}, {"clip": 1.0}])
def test_what_it_cannot_stand_beside_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="control_variate is on, but so is a rank baseline or a clip"):
        AgentSettings(control_variate=True, **options)  # type: ignore[arg-type]
