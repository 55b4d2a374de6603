"""Rollouts: sample masks, step the environment once, record what came back.

Shape suffixes: M masks (one per sub-environment), N filters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from ..policies.distributions import MaskSample
from ..policies.policy import Policy


@dataclass(frozen=True)
class Rollout:
    """One update's experience: M one-step episodes that start from the same observation.

    Attributes:
        observation: `weights` (N, D) and `statistics` (N, F), float32.
        sample: the sampled masks.
        rewards: (M,) float64.
        infos: everything in the environment's info that has one number per mask, float64 (M,).
    """

    observation: dict[str, Tensor]
    sample: MaskSample
    rewards: Tensor
    infos: dict[str, Tensor]


def collect_rollout(venv: gymnasium.vector.VectorEnv, policy: Policy, generator: torch.Generator) -> Rollout:
    """Sample one mask per sub-environment and score them all in one step.

    The environment is reset first: with Gymnasium's default autoreset every second step of a one-step
    episode would do nothing.

    Raises:
        ValueError: the episode does not end with the step, or a reward is not finite.
    """
    observation = observe(venv)
    with torch.no_grad():
        sample = policy(observation).sample(venv.num_envs, generator)
    rewards_M, infos = _step(venv, sample.masks)
    return Rollout(observation, sample, rewards_M, infos)


def observe(venv: gymnasium.vector.VectorEnv) -> dict[str, Tensor]:
    """Reset the environment and return what its first sub-environment sees; all see the same."""
    observation, _ = venv.reset()
    return {key: torch.tensor(np.asarray(rows)[0], dtype=torch.float32) for key, rows in observation.items()}


def evaluate_masks(venv: gymnasium.vector.VectorEnv, masks_KN: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Score any number of masks, as many at a time as the environment takes.

    Returns:
        rewards (K,) and the per-mask infos (K,).
    """
    parts: list[tuple[Tensor, dict[str, Tensor]]] = []
    for masks in masks_KN.split(venv.num_envs):
        venv.reset()
        # The last chunk is filled up with copies of its first mask.
        filler = masks[:1].expand(venv.num_envs - len(masks), -1)
        rewards_M, infos = _step(venv, torch.cat([masks, filler]))
        parts.append((rewards_M[: len(masks)], {key: value[: len(masks)] for key, value in infos.items()}))
    joined = {key: torch.cat([infos[key] for _, infos in parts]) for key in parts[0][1]}
    return torch.cat([rewards for rewards, _ in parts]), joined


def _step(venv: gymnasium.vector.VectorEnv, masks_MN: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    _, rewards, terminated, truncated, infos = venv.step(masks_MN.cpu().numpy().astype(np.int8))
    if not np.all(np.logical_or(terminated, truncated)):
        raise ValueError("one step must be one episode, but the environment did not end after a decision")
    rewards_M = torch.as_tensor(np.asarray(rewards, dtype=np.float64))
    if not torch.isfinite(rewards_M).all():
        raise ValueError(f"rewards must be finite, but the environment returned {rewards_M.tolist()}")
    return rewards_M, _per_mask(infos, len(masks_MN))


def _per_mask(infos: Mapping[str, Any], n_masks: int) -> dict[str, Tensor]:
    # SameStep autoreset moves the infos of the episode that just ended into "final_info".
    infos = {**infos, **infos.get("final_info", {})}
    numbers: dict[str, Tensor] = {}
    for key, value in infos.items():
        array = np.asarray(value)
        # Gymnasium adds a boolean "_key" beside each key: which sub-environments reported it.
        if not key.startswith("_") and array.shape == (n_masks,) and array.dtype.kind in "biuf":
            numbers[key] = torch.as_tensor(array.astype(np.float64))
    return numbers
