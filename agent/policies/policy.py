"""What the trainer needs of a policy, and the head that policies share: scores against a threshold.

Shape suffixes: N filters, D weights per filter, F statistics per filter.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ...errors import UserError
from .distributions import IndependentBernoulli, MaskDistribution, SharedThresholdBernoulli

Exploration: TypeAlias = Literal["budget", "bernoulli"]


class Policy(Protocol):
    """What the trainer needs of a policy, beside being an `nn.Module`."""

    kwargs: dict[str, Any]
    """The JSON-able constructor arguments it can be rebuilt from."""

    def __call__(self, observation: Mapping[str, Tensor]) -> MaskDistribution:
        """The distribution over keep masks for one layer's `weights` (N, D) and `statistics` (N, F)."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups: `params`, and `lr_scale` by which the learning rate is multiplied."""


class ThresholdHead(nn.Module):
    """Turns scores into a distribution; owns the threshold and, if it is explored, its spread.

    Args:
        exploration: "budget" samples the threshold (`SharedThresholdBernoulli`), "bernoulli" does not.
        initial_location: the first threshold.
        initial_scale: the first standard deviation of a sampled threshold.
    """

    def __init__(self, exploration: Exploration, initial_location: float, initial_scale: float) -> None:
        super().__init__()
        if exploration not in get_args(Exploration):
            raise UserError(f"exploration is {exploration!r}; expected one of {', '.join(get_args(Exploration))}.")
        self.exploration = exploration
        self.location = nn.Parameter(torch.tensor(initial_location))
        self.log_scale = nn.Parameter(torch.tensor(math.log(initial_scale)), requires_grad=exploration == "budget")

    def forward(self, scores_N: Tensor, shift: Tensor | float = 0.0) -> MaskDistribution:
        """The distribution of scores against a threshold moved by `shift`."""
        if self.exploration == "bernoulli":
            return IndependentBernoulli(scores_N - (self.location + shift))
        return SharedThresholdBernoulli(scores_N, self.location + shift, self.log_scale)


def check_keep(initial_keep: float) -> None:
    """Refuse a first keep probability outside (0, 1) with a UserError."""
    if not 0.0 < initial_keep < 1.0:
        raise UserError(f"initial_keep is {initial_keep}; expected the fraction to keep at first, in (0, 1).")
