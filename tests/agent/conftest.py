"""Toy environments: one decision, M masks a step, like the pruning environment but with known answers."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

NAMES = ("l1", "l2", "taylor", "apoz", "redundancy", "position")


class ToyVectorEnv(gymnasium.vector.VectorEnv):
    """M one-step episodes over one fixed layer; `score` maps masks (M, N) to rewards (M,)."""

    def __init__(
        self,
        weights: np.ndarray,
        statistics: np.ndarray,
        score: Callable[[np.ndarray], np.ndarray],
        n_masks: int = 16,
        names: tuple[str, ...] = NAMES,
    ) -> None:
        self.num_envs = n_masks
        self.statistic_names = names
        self.score = score
        self.n_steps = 0
        self.rows = {
            "weights": np.broadcast_to(weights.astype(np.float32), (n_masks, *weights.shape)),
            "statistics": np.broadcast_to(statistics.astype(np.float32), (n_masks, *statistics.shape)),
        }
        self.single_action_space = gymnasium.spaces.MultiBinary(len(weights))
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, n_masks)
        self.single_observation_space = gymnasium.spaces.Dict(
            {k: gymnasium.spaces.Box(-np.inf, np.inf, v.shape[1:]) for k, v in self.rows.items()}
        )
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, n_masks)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return dict(self.rows), {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        assert self.action_space.contains(actions)
        self.n_steps += 1
        rewards = self.score(actions.astype(bool)).astype(np.float64)
        ended = np.ones(self.num_envs, dtype=bool)
        infos = {"kept": actions.mean(1), "_kept": ended, "name": np.array(["toy"] * self.num_envs, dtype=object)}
        return dict(self.rows), rewards, ended, np.zeros_like(ended), infos


def useless_filters_env(
    n_filters: int = 12, seed: int = 0, n_masks: int = 16, n_weights: int = 18
) -> tuple[ToyVectorEnv, np.ndarray]:
    """Every other filter is useless: dropping it pays, dropping a useful one costs three times as much.

    The statistics say it only by half: "taylor" is noisy, "l1" says nothing, "apoz" is constant.
    """
    rng = np.random.default_rng(seed)
    useful = rng.permutation(np.arange(n_filters) % 2 == 0)
    statistics = rng.normal(size=(n_filters, len(NAMES)))
    statistics[:, NAMES.index("taylor")] = useful + 0.2 * rng.normal(size=n_filters)
    statistics[:, NAMES.index("apoz")] = 0.3
    weights = rng.normal(size=(n_filters, n_weights))

    def score(masks: np.ndarray) -> np.ndarray:
        return ((~masks & ~useful).sum(1) - 3.0 * (~masks & useful).sum(1)) / n_filters

    return ToyVectorEnv(weights, statistics, score, n_masks), useful


@pytest.fixture
def make_useless() -> Callable[..., tuple[ToyVectorEnv, np.ndarray]]:
    """The solvable toy: (environment, the mask that solves it)."""
    return useless_filters_env


@pytest.fixture
def make_env() -> type[ToyVectorEnv]:
    """The bare toy environment."""
    return ToyVectorEnv


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(0)
