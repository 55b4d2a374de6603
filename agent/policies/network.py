"""Network policy: scores all filters of a network at once; a budget says how many of them stay.

Shape suffixes: N filters, F features per filter, L groups, P parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...ranges import COUNT, FRACTION, check_number
from .features import check_observation, ranked_scores, ranks, weight_quantiles


class NetworkPolicy(nn.Module):
    """Ranks the filters within each group by a learned mix of what is seen of them, and weighs the groups.

    score_i = -rank_i / weight_l, with rank_i in (0, 1) the position in the group's own order, best first, and one
    learned weight per group. Cutting all filters at one score then keeps the fraction weight_l x constant of each
    group, so a few numbers say where a network is cut. The order is that of a linear mix of ranked statistics and
    quantiles of the absolute weights: equivariant over filters, so it means the same on another checkpoint; the group
    weights mean the same on any checkpoint of the same architecture.

    Args:
        n_groups: L.
        n_statistics: F, statistics per filter in the observation.
        warm_start: the statistic whose order is the first one, at mix 1; None starts from an arbitrary order.
        statistic_names: the observation's statistics in order; needed for `warm_start`.
        quantiles: of each filter's absolute weights.

    Raises:
        UserError: a statistic that is not in `statistic_names`.
    """

    def __init__(
        self,
        n_groups: int,
        n_statistics: int,
        warm_start: str | None = "l1",
        statistic_names: Sequence[str] | None = None,
        quantiles: Sequence[float] = (0.5, 0.9),
    ) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {
            "n_groups": n_groups,
            "n_statistics": n_statistics,
            "warm_start": warm_start,
            "statistic_names": None if statistic_names is None else list(statistic_names),
            "quantiles": list(quantiles),
        }
        check_number("n_groups", n_groups, COUNT)
        check_number("n_statistics", n_statistics, COUNT)
        check_number("quantiles", quantiles, FRACTION)
        self.quantiles = tuple(quantiles)
        mix = torch.zeros(n_statistics + len(self.quantiles), dtype=torch.float64)
        if warm_start is not None:
            if statistic_names is None or warm_start not in statistic_names:
                known = ", ".join(statistic_names) if statistic_names else "none, give statistic_names"
                raise UserError(f"warm_start is {warm_start!r}; expected one of the statistics: {known}.")
            mix[list(statistic_names).index(warm_start)] = 1.0
        self.mix = nn.Parameter(mix)
        self.log_weight = nn.Parameter(torch.zeros(n_groups, dtype=torch.float64))

    def parameter_vector(self) -> Tensor:
        """All parameters in one vector (P,): the groups' log weights, then the mix."""
        return torch.cat([self.log_weight.detach(), self.mix.detach()])

    def load_vector(self, vector: Tensor) -> None:
        """Take the parameters from a vector (P,)."""
        with torch.no_grad():
            self.log_weight.copy_(vector[: len(self.log_weight)])
            self.mix.copy_(vector[len(self.log_weight) :])

    def features(self, observation: Mapping[str, Tensor]) -> list[Tensor]:
        """What is seen of each group's filters: (N_l, F) per group, ranked within the group.

        Raises:
            ValueError: an observation of another number of groups or statistics, or without `groups`.
        """
        weights_ND, statistics_NF = check_observation(observation)
        owner_N = observation["groups"].long()
        expected = (len(self.log_weight), len(self.mix) - len(self.quantiles))
        came = (int(owner_N.max()) + 1, statistics_NF.shape[1])
        if came != expected:
            raise ValueError(
                f"this policy reads {expected[0]} groups and {expected[1]} statistics per filter, but {came[0]} and "
                f"{came[1]} came; use it on the architecture it was trained for"
            )
        described = torch.cat([statistics_NF, weight_quantiles(weights_ND, self.quantiles)], dim=1).double()
        return [ranks(described[owner_N == group]) for group in range(expected[0])]

    def scores(self, features: Sequence[Tensor], vector: Tensor | None = None) -> Tensor:
        """One score per filter (N,), comparable across groups, under the policy's own or other parameters (P,)."""
        vector = self.parameter_vector() if vector is None else vector
        return ranked_scores(features, vector[len(self.log_weight) :], vector[: len(self.log_weight)])
