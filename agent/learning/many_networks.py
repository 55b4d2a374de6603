"""Policy gradient over many networks at once, for a policy that reads networks (`GroupPolicy`).

The policy explores by a normal distribution around its action, action ~ Normal(mean(rows), diag(scale^2)), in mirrored
pairs (mean + noise, mean - noise). Each network and target is a world of its own. The REINFORCE gradient of its
expected reward with respect to the mean (Williams 1992, section 6, for the normal) is, with mirrored samples,

    g = mean over pairs of (reward_+ - reward_-) / 2 x noise / scale^2,

in which all that noise in either direction costs cancels. Rewards are divided by the spread of these differences, so
that worlds in which little can be gained count as much as others. The policy moves along it as far as a penalty on the
Kullback-Leibler divergence from the sampling policy allows (Kakade 2001, "A natural policy gradient"; the penalised
form of Schulman et al. 2017, arXiv 1707.06347, section 4), with the same parameters for all worlds.

Shape suffixes: L groups, R columns of a row, M samples, A numbers of an action.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError
from ...ranges import COUNT, NOT_NEGATIVE, POSITIVE, check_numbers
from ..policies.group_policy import GroupPolicy


@dataclass(frozen=True)
class PolicyScales:
    """Standard deviations of the exploration.

    Args:
        residual: of each group's log weight.
        mix: of each number by which features of a filter are mixed.
        temper: of the factor on the planned log weights.
    """

    residual: float = 0.35
    mix: float = 0.25
    temper: float = 0.25

    def __post_init__(self) -> None:
        check_numbers(self, residual=POSITIVE, mix=POSITIVE, temper=POSITIVE)

    def vector(self, n_groups: int, n_numbers: int) -> Tensor:
        """One per number of an action (A,), float64."""
        n_mix = n_numbers - n_groups - 1
        return torch.tensor([self.residual] * n_groups + [self.mix] * n_mix + [self.temper], dtype=torch.float64)


@dataclass(frozen=True)
class Experience:
    """What was tried in one world (a network at a target), under one policy.

    Attributes:
        rows: (L, R), as the policy reads them.
        mean: (A,) the action around which was sampled.
        scale: (A,) with which standard deviation.
        actions: (M, A), the second half mirrored to the first.
        rewards: (M,).
    """

    rows: Tensor
    mean: Tensor
    scale: Tensor
    actions: Tensor
    rewards: Tensor

    @property
    def direction(self) -> Tensor:
        """The natural gradient (A,) of the expected reward with respect to the mean, in standard deviations."""
        ahead, behind = self.rewards.chunk(2)
        differences = (ahead - behind) / 2
        spread = differences.square().mean().sqrt().clamp_min(1e-12)
        noise = (self.actions[: len(ahead)] - self.mean) / self.scale
        return (differences / spread) @ noise / len(ahead)


@dataclass(frozen=True)
class PolicyGradientSettings:
    """How far and how carefully the policy follows its gradient.

    Attributes:
        step: how far the mean of a single world would move, in the exploration's standard deviations times its
            direction; the inverse of the penalty on the divergence.
        steps: of Adam, on all worlds at once.
        lr: of Adam.
        shrink: ridge on the network's weights, which pulls them towards the plan that it corrects.
    """

    step: float = 2.0
    steps: int = 400
    lr: float = 1e-2
    shrink: float = 0.25

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}; expected 1 or more.")
        check_numbers(self, step=POSITIVE, steps=COUNT, lr=POSITIVE, shrink=NOT_NEGATIVE)


def explore(mean_A: Tensor, scale_A: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
    """Actions (M, A) around a mean, in mirrored pairs; ValueError for an odd number."""
    if n_samples < 2 or n_samples % 2:
        raise ValueError(f"{n_samples} samples were asked for; expected an even number from 2, they are mirrored")
    half = torch.randn(n_samples // 2, len(mean_A), generator=generator, dtype=torch.float64)
    return mean_A.double() + torch.cat([half, -half]) * scale_A


def improve(policy: GroupPolicy, worlds: Sequence[Experience], settings: PolicyGradientSettings) -> list[float]:
    """Move a policy along the gradient of all worlds; returns the penalised loss before each step of Adam.

    The divergence is measured from the policy that sampled, which may be an earlier one.
    """
    if not worlds:
        raise ValueError("there is nothing to learn from; expected at least one world")
    sizes = torch.tensor([len(world.rows) for world in worlds])
    owner = torch.arange(len(worlds)).repeat_interleave(sizes)
    rows = torch.cat([world.rows for world in worlds])
    aims = [world.mean + settings.step * world.scale * world.direction for world in worlds]
    # Maximising the direction to first order under a penalty of half the squared distance, in standard deviations, is
    # going where the direction of each world alone would end, as far as shared parameters can.
    aim_L = torch.cat([aim[:n] for aim, n in zip(aims, sizes, strict=True)]).float()
    aim_L = aim_L - _mean_by(aim_L, owner)[owner]
    aim_WM = torch.stack([aim[n:] for aim, n in zip(aims, sizes, strict=True)]).float()
    scale_L = torch.cat([world.scale[:n] for world, n in zip(worlds, sizes, strict=True)]).float()
    scale_WM = torch.stack([world.scale[n:] for world, n in zip(worlds, sizes, strict=True)]).float()
    weights = [value for name, value in policy.named_parameters() if name.endswith("weight")]
    optimiser = torch.optim.Adam(policy.parameters(), lr=settings.lr)
    history = []
    for _ in range(settings.steps):
        residual_L, temper_W = policy.corrections(rows, owner)
        shared_WM = torch.cat([policy.mix.expand(len(worlds), -1), temper_W[:, None]], 1)
        squares_W = _mean_by(((residual_L - aim_L) / scale_L).square(), owner)
        loss = (squares_W + ((shared_WM - aim_WM) / scale_WM).square().mean(1)).mean() / 2
        # In the loss, not decoupled as in AdamW: there a strong decay leaves only the signs of the weights.
        loss = loss + settings.shrink / 2 * torch.stack([weight.square().sum() for weight in weights]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    return history


def _mean_by(values_L: Tensor, owner_L: Tensor) -> Tensor:
    """Mean (W,) over the rows of each world."""
    return torch.zeros(int(owner_L.max()) + 1).index_add(0, owner_L, values_L) / torch.bincount(owner_L)
