"""A control variate for REINFORCE: what the mask's bits tell about the reward without any chance.

Shape suffixes: M masks, N filters, F statistics, K features (the statistics' ranks, and 1).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..policies.features import check_observation, ranks


class LinearControl:
    """Predicts a reward as raw mask @ weights (N,), the weights being linear in what is seen of the filters.

    REINFORCE then learns from the reward minus the prediction, and the gradient of the prediction's expectation,
    weights @ keep_probability, is added in closed form (Grathwohl et al. 2018, "Backpropagation through the Void",
    eq. 2, with a linear surrogate). The first-order (Taylor) effect of each filter is among the features, so this is
    gradient information wherever it predicts anything. The weights are fitted, with a ridge, to the masks of EARLIER
    updates alone: whatever they are, they do not depend on the masks they are used for, so the estimator stays
    unbiased.

    Args:
        ridge: relative to the mean energy of a feature.
    """

    def __init__(self, ridge: float = 0.1) -> None:
        self.ridge = ridge
        self._rows: list[Tensor] = []
        self._rewards: list[Tensor] = []

    def weights(self, observation: Mapping[str, Tensor]) -> Tensor:
        """What each kept filter adds to the reward, as predicted: (N,) float64; zeros before the first `add`."""
        features_NK = _features(observation)
        if not self._rows:
            return features_NK.new_zeros(len(features_NK))
        rows, rewards = torch.cat(self._rows), torch.cat(self._rewards)
        rows, rewards = rows - rows.mean(0), rewards - rewards.mean()
        energy_KK = rows.T @ rows
        damped_KK = energy_KK + (self.ridge * energy_KK.diagonal().mean() + 1e-12) * torch.eye(len(energy_KK)).double()
        return features_NK @ torch.linalg.solve(damped_KK, rows.T @ rewards)

    def add(self, observation: Mapping[str, Tensor], raw_MN: Tensor, rewards_M: Tensor) -> None:
        """Remember the masks of an update, once the update is made."""
        self._rows.append(raw_MN.cpu().double() @ _features(observation))
        self._rewards.append(rewards_M.cpu().double())

    def state_dict(self) -> dict[str, Any]:
        """Tensors only."""
        return {"rows": list(self._rows), "rewards": list(self._rewards)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._rows, self._rewards = list(state["rows"]), list(state["rewards"])


def _features(observation: Mapping[str, Tensor]) -> Tensor:
    _, statistics_NF = check_observation(observation)
    seen_NF = ranks(statistics_NF.cpu().double())
    # Divided by N: a mask's features do not grow with the layer.
    return torch.cat([torch.ones(len(seen_NF), 1, dtype=torch.float64), seen_NF], dim=1) / len(seen_NF)
