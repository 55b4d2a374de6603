"""Group policy: reads one row per filter group, of any network, and says how much of each stays and in which order.

Shape suffixes: L groups, R columns of a row, N filters, F features per filter, A numbers of an action.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...ranges import COUNT, FRACTION, check_number
from .features import check_observation, ranked_scores, ranks, weight_quantiles

PLANNED = "planned"
"""The column with the logarithm of what a plan without search keeps of each group."""


class GroupPolicy(nn.Module):
    """Corrects a plan: how much of each filter group stays, and which of its filters.

    Nothing in it belongs to an architecture: a small network reads the row of a group beside the mean of all rows
    (Zaheer et al. 2017, "Deep Sets"), so that it is equivariant over groups and takes any number of them. Its action is

        weight_l = exp(temper x planned_l + residual_l),    order = mix . features of a filter

    with `planned` the logarithm of what a plan without search keeps; filters are then cut off at one score over the
    whole network, score_i = -rank_i / weight_l, with rank_i in (0, 1) the place in the group's order, best first.
    Features of a filter are its ranked statistics, quantiles of its absolute weights, and its place in that plan.
    An untrained policy (residuals 0, temper 1, the plan's order) is the plan itself.

    Args:
        description_names: of the R columns; one of them is `planned`.
        statistic_names: of the statistics per filter.
        hidden: width of the network.
        quantiles: of each filter's absolute weights.
        read: the columns that the network reads; None reads all.

    Raises:
        UserError: names without `planned`, or columns to read that are not there.
    """

    def __init__(
        self,
        description_names: Sequence[str],
        statistic_names: Sequence[str],
        hidden: int = 32,
        quantiles: Sequence[float] = (0.5, 0.9),
        read: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {
            "description_names": list(description_names),
            "statistic_names": list(statistic_names),
            "hidden": hidden,
            "quantiles": list(quantiles),
            "read": None if read is None else list(read),
        }
        check_number("hidden", hidden, COUNT)
        check_number("quantiles", quantiles, FRACTION)
        if PLANNED not in description_names:
            raise UserError(f"The rows have no column {PLANNED!r}, only {', '.join(description_names)}; expected one.")
        names = list(description_names)
        chosen = names if read is None else list(read)
        if odd := [name for name in chosen if name not in names]:
            raise UserError(f"The rows have no column {odd[0]!r}; expected some of {', '.join(names)}.")
        self.n_described, n_columns = len(names), len(chosen)
        self.planned, self.columns = names.index(PLANNED), [names.index(name) for name in chosen]
        self.n_statistics, self.quantiles = len(statistic_names), tuple(quantiles)
        self.centre: Tensor
        self.spread: Tensor
        self.register_buffer("centre", torch.zeros(n_columns))
        self.register_buffer("spread", torch.ones(n_columns))
        self.read = nn.Sequential(nn.Linear(n_columns, hidden), nn.ReLU())
        self.combine = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU())
        self.residual = nn.Linear(hidden + n_columns, 1)
        self.temper = nn.Linear(hidden, 1)
        self.mix = nn.Parameter(torch.zeros(len(statistic_names) + len(self.quantiles) + 1))
        with torch.no_grad():
            for layer in (self.residual, self.temper):
                layer.weight.zero_()
                layer.bias.zero_()
            self.temper.bias.fill_(1.0)
            self.mix[-1] = 1.0

    def normalise(self, rows: Sequence[Tensor]) -> None:
        """Take mean and spread of each column from rows (L, R) of the networks to learn from; constant columns stay."""
        seen = torch.cat(list(rows)).float()[:, self.columns]
        spread = seen.std(0, correction=0)
        self.centre.copy_(seen.mean(0))
        self.spread.copy_(torch.where(spread > 1e-6, spread, torch.ones_like(spread)))

    def action(self, rows_LR: Tensor) -> Tensor:
        """The mean action (A,) for a network's rows: residuals (L), mix (F), temper (1)."""
        residual_L, temper_1 = self.corrections(rows_LR, torch.zeros(len(rows_LR), dtype=torch.int64))
        return torch.cat([residual_L, self.mix, temper_1])

    def plan(self, n_groups: int) -> Tensor:
        """The action (A,) that corrects nothing: the plan itself."""
        return torch.cat([torch.zeros(n_groups), torch.zeros(len(self.mix) - 1), torch.ones(2)])

    def corrections(self, rows_LR: Tensor, owner_L: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals (L,) and tempers (W,) of W networks at once, whose rows stand one below the other.

        Args:
            rows_LR: of all networks.
            owner_L: int64, the network each row belongs to, 0 to W - 1.
        """
        seen_LR = ((rows_LR[:, self.columns].float() - self.centre) / self.spread).clamp(-4, 4)
        read_LH = self.read(seen_LR)
        pooled_WH = _means(read_LH, owner_L)
        both = self.combine(torch.cat([read_LH, pooled_WH[owner_L]], 1))
        residual_L = self.residual(torch.cat([both, seen_LR], 1))[:, 0]
        # Only differences between groups matter: the budget fixes the level.
        return residual_L - _means(residual_L[:, None], owner_L)[owner_L, 0], self.temper(pooled_WH)[:, 0]

    def features(self, observation: Mapping[str, Tensor]) -> list[Tensor]:
        """What is seen of each group's filters: (N_l, F) per group, float64.

        Raises:
            ValueError: an observation without rows of groups, or with other columns.
        """
        weights_ND, statistics_NF = check_observation(observation)
        rows_LR, owner_N = observation["descriptions"], observation["groups"].long()
        expected = (self.n_described, self.n_statistics)
        came = (rows_LR.shape[1], statistics_NF.shape[1])
        if came != expected or len(rows_LR) != int(owner_N.max()) + 1:
            raise ValueError(
                f"this policy reads rows of {expected[0]} columns and {expected[1]} statistics per filter, but "
                f"{came[0]} and {came[1]} came, with {len(rows_LR)} rows for {int(owner_N.max()) + 1} groups"
            )
        described = torch.cat([statistics_NF, weight_quantiles(weights_ND, self.quantiles)], 1).double()
        places_N1 = observation["places"][:, None].double()
        return [
            torch.cat([ranks(described[owner_N == group]), places_N1[owner_N == group]], 1)
            for group in range(len(rows_LR))
        ]

    def log_weights(self, rows_LR: Tensor, action_A: Tensor | None = None) -> Tensor:
        """Logarithms (L,) of the groups' weights, float64, under the mean action or another one."""
        action_A = self.action(rows_LR) if action_A is None else action_A
        return (action_A[-1] * rows_LR[:, self.planned] + action_A[: len(rows_LR)]).double()

    def scores(self, observation: Mapping[str, Tensor], action_A: Tensor | None = None) -> Tensor:
        """One score per filter (N,), float64, comparable across groups, under the mean action or another one (A,)."""
        action_A = self.action(observation["descriptions"]) if action_A is None else action_A
        return self.scores_of(observation, [action_A])[0]

    def scores_of(self, observation: Mapping[str, Tensor], actions: Sequence[Tensor]) -> list[Tensor]:
        """Scores (N,) under each of several actions (A,); what is seen of the filters is ranked once."""
        rows_LR, features = observation["descriptions"], self.features(observation)
        return [
            ranked_scores(features, action_A[len(rows_LR) : -1].double(), self.log_weights(rows_LR, action_A))
            for action_A in actions
        ]


def _means(values_LH: Tensor, owner_L: Tensor) -> Tensor:
    """The mean row of each owner, (W, H)."""
    n_owners = int(owner_L.max()) + 1
    sums = values_LH.new_zeros(n_owners, values_LH.shape[1]).index_add(0, owner_L, values_LH)
    return sums / torch.bincount(owner_L, minlength=n_owners)[:, None]
