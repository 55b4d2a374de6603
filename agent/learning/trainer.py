"""Training loop of one agent: act, learn, remember the best masks, stop once the reward no longer rises.

Shape suffixes: M masks, N filters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import gymnasium
import torch
from torch import Tensor

from ...errors import UserError
from ...ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, check_numbers
from ..policies.distributions import top_mask
from ..policies.policy import Policy
from .best_masks import BestMasks, ScoredMask
from .reinforce import BASELINES, Reinforce, ReinforceSettings
from .rollout import Rollout, collect_rollout, evaluate_masks, observe


@dataclass(frozen=True)
class AgentSettings:
    """How one agent is trained.

    Attributes:
        updates: at most this many; each costs as many mask evaluations as the environment has sub-environments.
        lr: Adam's learning rate of the policy's fast parameters.
        entropy_weight: bonus for each nat of entropy per filter.
        baseline: "leave_one_out" (unbiased), "rank" (biased, but no outlier drowns an update: for rewards
            without a lower bound) or "none".
        clip: bound of the advantages, or None.
        max_grad_norm: the gradient is scaled down to this norm, or None.
        patience: stop once the smoothed mean reward has not risen by min_gain for this many updates; None
            makes all updates.
        min_gain: what counts as risen.
        smoothing: weight of the past in the smoothed mean reward, in [0, 1).
        top_k: how many of the best distinct masks are remembered.
        sweep: after training, score one batch of masks that cut the learned ranking at other thresholds.
    """

    updates: int = 40
    lr: float = 0.07
    entropy_weight: float = 0.01
    baseline: str = "leave_one_out"
    clip: float | None = None
    max_grad_norm: float | None = 1.0
    patience: int | None = 20
    min_gain: float = 1e-3
    smoothing: float = 0.8
    top_k: int = 8
    sweep: bool = True

    def __post_init__(self) -> None:
        if self.baseline not in BASELINES:
            raise UserError(f"baseline is {self.baseline!r}, but it must be one of {', '.join(BASELINES)}")
        if self.updates < 0:
            raise UserError(f"updates is {self.updates}, but it cannot be below 0")
        if not self.lr > 0:
            raise UserError(f"lr is {self.lr}, but a learning rate must be above 0")
        if self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, but at least 1 mask must be remembered")
        if self.patience is not None and self.patience < 1:
            raise UserError(f"patience is {self.patience}, but it must be at least 1, or None for all updates")
        if not 0.0 <= self.smoothing < 1.0:
            raise UserError(f"smoothing is {self.smoothing}, but it must lie in [0, 1)")
        check_numbers(self, updates=COUNT_OR_NONE, lr=POSITIVE, entropy_weight=NOT_NEGATIVE, clip=POSITIVE)
        check_numbers(self, max_grad_norm=POSITIVE, patience=COUNT, min_gain=NOT_NEGATIVE, top_k=COUNT)

    def reinforce(self) -> ReinforceSettings:
        """The part that the learner reads."""
        return ReinforceSettings(self.lr, self.entropy_weight, self.baseline, self.clip, self.max_grad_norm)


@dataclass(frozen=True)
class TrainingResult:
    """What training one agent left, beside the trained policy.

    Attributes:
        history: the metrics of each update, in order.
        best: the best distinct masks that were scored, best first.
        greedy: the policy's greedy mask (N,), bool.
        greedy_reward: its reward, or None where no sweep was made.
        converged: whether patience stopped it.
        n_updates: updates made.
    """

    history: list[dict[str, float]]
    best: list[ScoredMask]
    greedy: Tensor
    greedy_reward: float | None
    converged: bool
    n_updates: int


class Trainer:
    """One agent's training, one update at a time. A layer's search is the unit that resumes, so it keeps no state.

    Args:
        venv: an environment whose sub-environments all see the same layer; one step is one episode.
        policy: trained in place.
        settings: how.
        generator: the only source of randomness, apart from the environment's own.
    """

    def __init__(
        self,
        venv: gymnasium.vector.VectorEnv,
        policy: Policy,
        settings: AgentSettings,
        generator: torch.Generator,
    ) -> None:
        self.venv, self.policy, self.settings, self.generator = venv, policy, settings, generator
        self.learner = Reinforce(policy, settings.reinforce())
        self.best = BestMasks(settings.top_k)
        self.history: list[dict[str, float]] = []
        self._progress = _Progress()

    @property
    def converged(self) -> bool:
        """Whether the smoothed mean reward has not risen for `patience` updates."""
        return self.settings.patience is not None and self._progress.stale >= self.settings.patience

    @property
    def done(self) -> bool:
        """Whether training is over: converged, or all updates made."""
        return self.converged or len(self.history) >= self.settings.updates

    def step(self) -> dict[str, float]:
        """Make one update and return its metrics.

        Those of `Reinforce.update`, the mean of every per-mask info of the environment as `info/<name>`,
        `best_reward` so far and `smoothed_reward`.
        """
        rollout = collect_rollout(self.venv, self.policy, self.generator)
        self.best.add(rollout.sample.masks, rollout.rewards)
        metrics = self.learner.update(rollout) | _info_means(rollout)
        self._progress.add(metrics["reward_mean"], self.settings)
        metrics |= {"best_reward": self.best.masks[0].reward, "smoothed_reward": self._progress.smoothed}
        self.history.append(metrics)
        return metrics

    def result(self) -> TrainingResult:
        """What training left; with `settings.sweep` it scores one more batch of masks first."""
        with torch.no_grad():
            distribution = self.policy(observe(self.venv))
        greedy, reward = distribution.greedy(), None
        if self.settings.sweep:
            masks = threshold_masks(distribution.logits, greedy, self.venv.num_envs)
            rewards, _ = evaluate_masks(self.venv, masks)
            self.best.add(masks, rewards)
            reward = rewards[0].item()
        best = list(self.best.masks)
        return TrainingResult(list(self.history), best, greedy.cpu(), reward, self.converged, len(self.history))


def train_agent(
    venv: gymnasium.vector.VectorEnv,
    policy: Policy,
    settings: AgentSettings,
    generator: torch.Generator,
    *,
    callback: Callable[[Trainer, Mapping[str, float]], None] | None = None,
) -> TrainingResult:
    """Train a policy in place until it converges or the updates are spent.

    Args:
        venv: see `Trainer`.
        policy: see `Trainer`.
        settings: how.
        generator: see `Trainer`.
        callback: called after each update with the trainer and the update's metrics, to log them.
    """
    trainer = Trainer(venv, policy, settings, generator)
    while not trainer.done:
        metrics = trainer.step()
        if callback is not None:
            callback(trainer, metrics)
    return trainer.result()


def threshold_masks(logits: Tensor, greedy: Tensor, n_masks: int) -> Tensor:
    """The greedy mask first, then the same ranking cut elsewhere (<= n_masks, N).

    Quadratic steps: dense around the greedy count, out to a third of the layer on either side.
    """
    n_filters, kept = len(logits), int(greedy.sum())
    half = max(1, n_masks // 2)
    counts = [kept]
    for j in range(1, n_masks):
        distance = max(j, round(n_filters / 3 * (j / half) ** 2))
        counts += [c for c in (kept - distance, kept + distance) if 1 <= c <= n_filters]
    return torch.stack([greedy, *(top_mask(logits, count) for count in counts[1:n_masks])])


@dataclass
class _Progress:
    """The smoothed mean reward and for how many updates it has not risen."""

    smoothed: float = 0.0
    best: float = field(default=float("-inf"))
    stale: int = 0
    n_updates: int = 0

    def add(self, reward: float, settings: AgentSettings) -> None:
        past = settings.smoothing if self.n_updates else 0.0
        self.smoothed = past * self.smoothed + (1.0 - past) * reward
        self.n_updates += 1
        if self.smoothed > self.best + settings.min_gain:
            self.best, self.stale = self.smoothed, 0
        else:
            self.stale += 1


def _info_means(rollout: Rollout) -> dict[str, float]:
    return {f"info/{name}": values.mean().item() for name, values in rollout.infos.items()}
