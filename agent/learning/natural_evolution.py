"""Parameter-exploring policy gradients (PGPE) along the natural gradient (separable NES), for a network's agent.

Where one mask decides on a whole network, noise on a few parameters explores better than noise on every bit: the
policy itself is sampled, theta ~ Normal(mean, diag(scale^2)), and acts deterministically. The score function of that
normal distribution gives the same estimator as REINFORCE (Williams 1992; Sehnke et al. 2010, "Parameter-exploring
policy gradients", eq. 8 to 11, with antithetic pairs); it is followed along its natural gradient, which is exact and
cheap for a diagonal normal (Wierstra et al. 2014, "Natural evolution strategies", eq. 18 and 24).

Shape suffixes: M masks, N filters, P parameters.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import torch
from torch import Tensor

from ...errors import UserError
from ...ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, check_numbers
from ..policies.network import NetworkPolicy
from .best_masks import BestMasks
from .rollout import evaluate_masks, observe

Project = Callable[[Tensor], Tensor]
"""Scores (N,) -> keep mask (N,) bool that meets a budget; part of the world, as far as the agent is concerned."""


@dataclass(frozen=True)
class NetworkAgentSettings:
    """How a network's agent is trained by PGPE.

    Attributes:
        updates: number of updates; each costs as many mask evaluations as the environment has sub-environments.
        weight_scale: initial standard deviation of the groups' log weights.
        mix_scale: initial standard deviation of the mix; 0 keeps the order of the warm start.
        lr: step of the mean along the natural gradient.
        scale_lr: step of the log scales; None takes (3 + ln P) / (5 sqrt P).
        anneal: by the last update the noise has fallen, linearly, to this fraction of the scale; 1 leaves it.
        top_k: how many of the best distinct masks are remembered.
    """

    updates: int = 25
    weight_scale: float = 0.5
    mix_scale: float = 0.3
    lr: float = 1.0
    scale_lr: float | None = None
    anneal: float = 0.3
    top_k: int = 12

    def __post_init__(self) -> None:
        if self.updates < 0 or self.top_k < 1:
            raise UserError(f"updates is {self.updates} and top_k {self.top_k}, but they must be at least 0 and 1")
        if not self.weight_scale > 0 or not self.mix_scale >= 0 or not self.lr > 0:
            raise UserError(
                f"weight_scale is {self.weight_scale}, mix_scale {self.mix_scale} and lr {self.lr}, but all must be "
                "above 0 (mix_scale may be 0)"
            )
        if not 0 < self.anneal <= 1:
            raise UserError(f"anneal is {self.anneal}, but it must be above 0 and at most 1")
        check_numbers(self, updates=COUNT_OR_NONE, weight_scale=POSITIVE, mix_scale=NOT_NEGATIVE, lr=POSITIVE)
        check_numbers(self, scale_lr=NOT_NEGATIVE, top_k=COUNT)


def utilities(rewards_M: Tensor) -> Tensor:
    """Advantages (M,) from ranks alone, of mean 0: the better half gets nearly all the weight.

    Equal rewards share theirs. Fitness shaping of Wierstra et al. 2014, section 3.1: unmoved by outliers and by scale.
    """
    n_masks = len(rewards_M)
    raw = (math.log(n_masks / 2 + 1) - torch.arange(1, n_masks + 1, dtype=torch.float64).log()).clamp_min(0)
    shaped = raw / raw.sum() - 1 / n_masks
    result = torch.empty(n_masks, dtype=torch.float64)
    for value in rewards_M.unique():
        same = rewards_M == value
        better = int((rewards_M > value).sum())
        result[same] = shaped[better : better + int(same.sum())].mean()
    return result


class NetworkTrainer:
    """Trains a `NetworkPolicy` in place by PGPE, one update at a time; `state_dict` is all it takes to resume.

    Each update draws M / 2 parameter vectors and their mirror images around the mean, scores the M masks they lead to,
    and moves mean and standard deviations along the natural gradient of the expected utility.

    Args:
        venv: one step is one episode, an action has one bit per filter of the network.
        policy: its parameters are the distribution's mean.
        project: turns scores into a mask.
        settings: how.
        generator: the only source of randomness, apart from the environment's own.
    """

    def __init__(
        self,
        venv: gymnasium.vector.VectorEnv,
        policy: NetworkPolicy,
        project: Project,
        settings: NetworkAgentSettings,
        generator: torch.Generator,
    ) -> None:
        if venv.num_envs < 4 or venv.num_envs % 2:
            raise ValueError(f"the environment takes {venv.num_envs} masks per step; expected an even number from 4")
        self.venv, self.policy, self.project = venv, policy, project
        self.settings, self.generator = settings, generator
        self.features = policy.features(observe(venv))
        n_groups, n_mix = len(policy.log_weight), len(policy.mix)
        scale = [settings.weight_scale] * n_groups + [settings.mix_scale] * n_mix
        self.scale = torch.tensor(scale, dtype=torch.float64)
        self.best = BestMasks(settings.top_k)
        self.history: list[dict[str, float]] = []

    @property
    def done(self) -> bool:
        """Whether all updates are made."""
        return len(self.history) >= self.settings.updates

    def mask(self, vector: Tensor | None = None) -> Tensor:
        """The mask (N,) of the mean policy, or of other parameters (P,)."""
        return self.project(self.policy.scores(self.features, vector))

    def step(self) -> dict[str, float]:
        """Make one update and return its metrics: `reward_mean`, `reward_max`, `scale`, the infos' means."""
        mean, spread = self.policy.parameter_vector(), self.scale * self._heat()
        half = torch.randn(self.venv.num_envs // 2, len(mean), generator=self.generator, dtype=torch.float64)
        noise_MP = torch.cat([half, -half])
        masks_MN = torch.stack([self.mask(mean + spread * noise) for noise in noise_MP])
        rewards_M, infos = evaluate_masks(self.venv, masks_MN)
        self.best.add(masks_MN, rewards_M)
        self._learn(mean, spread, noise_MP, utilities(rewards_M))
        metrics = {
            "reward_mean": rewards_M.mean().item(),
            "reward_max": rewards_M.max().item(),
            "scale": spread[: len(self.policy.log_weight)].mean().item(),
            **{f"info/{name}": values.mean().item() for name, values in infos.items()},
        }
        self.history.append(metrics)
        return metrics

    def _heat(self) -> float:
        done = len(self.history) / max(self.settings.updates - 1, 1)
        return 1.0 - (1.0 - self.settings.anneal) * done

    def _learn(self, mean: Tensor, spread: Tensor, noise_MP: Tensor, utilities_M: Tensor) -> None:
        n_parameters = len(mean)
        self.policy.load_vector(mean + self.settings.lr * spread * (utilities_M @ noise_MP))
        rate = self.settings.scale_lr
        rate = (3 + math.log(n_parameters)) / (5 * math.sqrt(n_parameters)) if rate is None else rate
        self.scale = self.scale * torch.exp(rate / 2 * (utilities_M @ (noise_MP.square() - 1)))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: `torch.load(weights_only=True)` reads it back."""
        return {
            "policy": self.policy.state_dict(),
            "scale": self.scale,
            "generator": self.generator.get_state(),
            "best": self.best.state_dict(),
            "history": [dict(metrics) for metrics in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`, bit for bit (apart from the environment's own randomness)."""
        self.policy.load_state_dict(state["policy"])
        self.scale = state["scale"].clone()
        self.generator.set_state(state["generator"])
        self.best.load_state_dict(state["best"])
        self.history = [dict(metrics) for metrics in state["history"]]
