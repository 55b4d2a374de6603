"""The default policy: permutation-equivariant over a layer's filters (in the manner of DeepSets), for any layer.

Shape suffixes: N filters, D weights per filter, F statistics per filter, H hidden units.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...ranges import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, check_number
from .distributions import MaskDistribution
from .features import check_observation, layer_context, ranks, standardise, weight_quantiles
from .policy import Exploration, ThresholdHead, check_keep


class SetPolicy(nn.Module):
    """A policy for any layer: permutation-equivariant over filters, independent of N and D.

    Each filter is described by its statistics and the quantiles of its absolute weights, standardised and
    ranked within the layer. A linear score plus a small network that also sees pooled context rank the
    filters, and a threshold cuts the ranking. Duplicating every filter leaves the scores unchanged. Not in
    the paper, whose policy reads filter i at input i and cannot be reused on another checkpoint.

    Args:
        n_statistics: F, statistics per filter in the observation.
        hidden: units of the hidden layers.
        quantiles: of each filter's absolute weights.
        exploration: "budget" (a sampled threshold) or "bernoulli".
        initial_keep: fraction of the filters kept at the start, in (0, 1).
        initial_scale: first standard deviation of the sampled threshold, as a fraction of the layer: 0.2 makes
            the kept fraction vary by about 0.2.
        warm_start: name of the statistic whose rank is the first score; None starts with equal scores.
        statistic_names: the observation's statistics in order; needed for `warm_start`.
        sharpness: half the range of the warm-started scores; the larger, the less random a sampled mask.
        seed: of the initial weights.

    Raises:
        UserError: an argument outside its range, or a statistic that is not in `statistic_names`.
    """

    def __init__(
        self,
        n_statistics: int,
        hidden: int = 64,
        quantiles: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9),
        exploration: Exploration = "budget",
        initial_keep: float = 0.85,
        initial_scale: float = 0.2,
        warm_start: str | None = None,
        statistic_names: Sequence[str] | None = None,
        sharpness: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {
            "n_statistics": n_statistics,
            "hidden": hidden,
            "quantiles": list(quantiles),
            "exploration": exploration,
            "initial_keep": initial_keep,
            "initial_scale": initial_scale,
            "warm_start": warm_start,
            "statistic_names": None if statistic_names is None else list(statistic_names),
            "sharpness": sharpness,
            "seed": seed,
        }
        check_keep(initial_keep)
        if not initial_scale > 0.0:
            raise UserError(f"initial_scale is {initial_scale}; expected a spread above 0.")
        check_number("n_statistics", n_statistics, COUNT)
        check_number("hidden", hidden, COUNT)
        check_number("quantiles", quantiles, FRACTION)
        check_number("initial_scale", initial_scale, POSITIVE)
        check_number("sharpness", sharpness, NOT_NEGATIVE)
        self.n_statistics = n_statistics
        self.quantiles = tuple(quantiles)
        n_features = 2 * (n_statistics + len(self.quantiles))
        column = _warm_column(warm_start, statistic_names, n_statistics)
        spread = sharpness if column is not None else 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(n_features, hidden)
        if column is not None:
            # The rank features follow the standardised ones.
            self.linear.weight.data[0, n_features // 2 + column] = sharpness
        # A kept fraction moves by d when the threshold moves by 2 d sharpness, or by 4 d at equal scores.
        scale = initial_scale * max(2.0 * spread, 4.0)
        self.head = ThresholdHead(exploration, _location_for(initial_keep, spread), scale)

    def _build(self, n_features: int, hidden: int) -> None:
        self.linear = nn.Linear(n_features, 1, bias=False)
        self.encode = nn.Linear(n_features, hidden)
        self.context = nn.Linear(2 * hidden + 2 * self.n_statistics, hidden)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.residual = nn.Linear(hidden, 1, bias=False)
        self.shift = nn.Linear(hidden, 1, bias=False)
        for layer in (self.linear, self.residual, self.shift):
            nn.init.zeros_(layer.weight)

    def forward(self, observation: Mapping[str, Tensor]) -> MaskDistribution:
        """The distribution over keep masks for `weights` (N, D) and `statistics` (N, F), any N and D.

        Raises:
            ValueError: F is not what the policy was built for, or a value is not finite.
        """
        features_NX, context = self._features(observation)
        hidden_NH = torch.relu(self.encode(features_NX))
        pooled = torch.cat([hidden_NH.mean(0), hidden_NH.amax(0), context])
        context_H = torch.relu(self.context(pooled))
        both = torch.cat([hidden_NH, context_H.expand(len(hidden_NH), -1)], dim=1)
        scores_N = (self.linear(features_NX) + self.residual(torch.relu(self.combine(both)))).squeeze(1)
        # Centred, so that the scores only rank and the threshold alone says how many.
        return self.head(scores_N - scores_N.mean(), self.shift(context_H).squeeze(0) / len(context_H))

    def _features(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        weights_ND, statistics_NF = check_observation(observation)
        if statistics_NF.shape[1] != self.n_statistics:
            raise ValueError(
                f"this policy reads {self.n_statistics} statistics per filter, but the observation has "
                f"{statistics_NF.shape[1]}; use an agent trained on the same observation format"
            )
        described = torch.cat([statistics_NF, weight_quantiles(weights_ND, self.quantiles)], dim=1)
        return torch.cat([standardise(described), ranks(described)], dim=1), layer_context(statistics_NF)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The threshold and the linear score learn at the full rate, the network at a tenth of it."""
        fast = [self.linear.weight, self.head.location, self.head.log_scale]
        fast_ids = {id(parameter) for parameter in fast}
        slow = [parameter for parameter in self.parameters() if id(parameter) not in fast_ids]
        return [{"params": fast, "lr_scale": 1.0}, {"params": slow, "lr_scale": 0.1}]


def _warm_column(name: str | None, names: Sequence[str] | None, n_statistics: int) -> int | None:
    if names is not None and len(names) != n_statistics:
        raise ValueError(f"statistic_names names {len(names)} statistics, but n_statistics is {n_statistics}")
    if name is None:
        return None
    if names is None or name not in names:
        known = ", ".join(names) if names else "none, give statistic_names"
        raise UserError(f"warm_start is {name!r}; expected one of the statistics: {known}.")
    return list(names).index(name)


def _location_for(initial_keep: float, spread: float) -> float:
    """The threshold that scores spread evenly over +-spread pass with mean probability initial_keep."""
    scores = torch.linspace(-spread, spread, 257, dtype=torch.float64, device="cpu")
    low, high = -spread - 20.0, spread + 20.0
    for _ in range(60):
        middle = (low + high) / 2
        kept = torch.sigmoid(scores - middle).mean().item()
        low, high = (middle, high) if kept > initial_keep else (low, middle)
    return (low + high) / 2
