"""REINFORCE, the policy-gradient estimator, over M sampled masks: baselines, loss and learner.

Shape suffixes: M masks, N filters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..policies.distributions import MaskDistribution, MaskSample
from ..policies.policy import Policy
from .rollout import Rollout

BASELINES = ("none", "leave_one_out", "rank")


def leave_one_out_advantages(rewards_M: Tensor) -> Tensor:
    """Each reward minus the mean of the OTHER masks' rewards (M,).

    The baseline of a mask does not depend on that mask, so the gradient stays unbiased (Kool et al., "Buy 4
    REINFORCE Samples, Get a Baseline for Free!", 2019, eq. 8), and the scale stays, which z-scoring loses.

    Raises:
        ValueError: fewer than two masks.
    """
    n_masks = len(rewards_M)
    if n_masks < 2:
        raise ValueError("a leave-one-out baseline needs at least 2 masks per update; sample more masks")
    return (rewards_M - rewards_M.mean()) * (n_masks / (n_masks - 1))


def rank_advantages(rewards_M: Tensor) -> Tensor:
    """The rewards' ranks spread over [-1, 1] (M,); equal rewards share their mean rank.

    No outlier can drown an update. Biased: it prefers what is often good to what is good on average.

    Raises:
        ValueError: fewer than two masks.
    """
    n_masks = len(rewards_M)
    if n_masks < 2:
        raise ValueError("ranking needs at least 2 masks per update; sample more masks")
    below_M = (rewards_M[None, :] < rewards_M[:, None]).sum(1)
    upto_M = (rewards_M[None, :] <= rewards_M[:, None]).sum(1)
    return (below_M + upto_M - 1).to(rewards_M.dtype) / (n_masks - 1) - 1.0


def advantages(rewards_M: Tensor, baseline: str = "leave_one_out", clip: float | None = None) -> Tensor:
    """The advantages (M,) under a baseline, clipped to +-clip if given (which biases them).

    Raises:
        ValueError: an unknown baseline.
    """
    if baseline == "none":
        advantages_M = rewards_M
    elif baseline == "leave_one_out":
        advantages_M = leave_one_out_advantages(rewards_M)
    elif baseline == "rank":
        advantages_M = rank_advantages(rewards_M)
    else:
        raise ValueError(f"baseline is {baseline!r}, but it must be one of none, leave_one_out, rank")
    return advantages_M if clip is None else advantages_M.clamp(-clip, clip)


def reinforce_loss(
    distribution: MaskDistribution, sample: MaskSample, advantages_M: Tensor, entropy_weight: float = 0.0
) -> Tensor:
    """The scalar whose gradient is minus the policy gradient (Williams, 1992), minus an entropy bonus.

    mean over masks of -advantage x log-probability (the SUM over filters: a mean would make the gradient N
    times too small), minus entropy_weight x entropy per filter in nats.
    """
    log_prob_M = distribution.log_prob(sample)
    policy_loss = -(advantages_M.to(log_prob_M) * log_prob_M).mean()
    return policy_loss - entropy_weight * distribution.entropy() / sample.raw.shape[1]


@dataclass(frozen=True)
class ReinforceSettings:
    """How an update is made; `AgentSettings` has the defaults.

    Attributes:
        lr: Adam's learning rate of a policy's fast parameters (`parameter_groups`).
        entropy_weight: bonus for each nat of entropy per filter.
        baseline: "leave_one_out" (unbiased), "rank" (robust, biased) or "none".
        clip: bound of the advantages, or None.
        max_grad_norm: the gradient is scaled down to this norm, or None.
    """

    lr: float
    entropy_weight: float
    baseline: str
    clip: float | None
    max_grad_norm: float | None


class Reinforce:
    """The learner: owns the optimiser, turns a rollout into one step of the policy.

    Args:
        policy: any policy; only parameters that require gradients are trained.
        settings: how.
    """

    def __init__(self, policy: Policy, settings: ReinforceSettings) -> None:
        self.policy = policy
        self.settings = settings
        groups = [
            {
                "params": [p for p in group["params"] if p.requires_grad],
                "lr": self.settings.lr * group.get("lr_scale", 1.0),
            }
            for group in policy.parameter_groups()
        ]
        self.optimizer = torch.optim.Adam(groups, lr=self.settings.lr)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learn from one rollout.

        Returns:
            metrics: `loss`, `entropy` (nats per filter), `gradient_norm` (before clipping), `reward_mean`,
            `reward_std`, `reward_max`, `kept_mean` and `kept_std` (fractions).
        """
        settings = self.settings
        distribution = self.policy(rollout.observation)
        advantages_M = advantages(rollout.rewards, settings.baseline, settings.clip)
        loss = reinforce_loss(distribution, rollout.sample, advantages_M, settings.entropy_weight)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = self._clip_gradient()
        self.optimizer.step()
        entropy = distribution.entropy().item() / rollout.sample.raw.shape[1]
        return {"loss": loss.item(), "entropy": entropy, "gradient_norm": norm, **_reward_metrics(rollout)}

    def _clip_gradient(self) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        bound = self.settings.max_grad_norm
        return nn.utils.clip_grad_norm_(parameters, float("inf") if bound is None else bound).item()


def _reward_metrics(rollout: Rollout) -> dict[str, float]:
    rewards_M, kept_M = rollout.rewards, rollout.sample.masks.double().mean(1)
    return {
        "reward_mean": rewards_M.mean().item(),
        "reward_std": rewards_M.std(correction=0).item(),
        "reward_max": rewards_M.max().item(),
        "kept_mean": kept_M.mean().item(),
        "kept_std": kept_M.std(correction=0).item(),
    }
