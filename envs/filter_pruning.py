"""Gymnasium environments for filter pruning: one decision, one keep/drop bit per filter.

Shapes: M masks (parallel episodes), N filters, D weights per filter, F statistics per filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import nn

from ..errors import UserError
from ..rewards.outcome import Outcome, Reward, RewardFunction
from .data.splits import Splits
from .observation import STATISTIC_NAMES
from .one_shot import OneShotTask
from .repair.reconstruction import ReconstructionSettings
from .task import DecisionTask, EvaluationSettings, PruningTask

Observations = dict[str, NDArray[np.float32]]


class FilterPruningEnv(gymnasium.Env[Observations, NDArray[np.int8]]):
    """Keep or drop every filter of one group (the paper's form), or of all groups of a network, in one decision.

    ## Action space
    `MultiBinary(N)`: 1 keeps a filter, 0 drops it. For a whole network N counts the filters of all groups, group after
    group in execution order. An action that keeps nothing of a group is refused with a ValueError.

    ## Observation space
    `Dict`, all float32:

    | key | shape | meaning |
    |---|---|---|
    | `weights` | (N, D) | the filters' convolution weights, flattened; in a network, rows of narrower groups end in 0 |
    | `statistics` | (N, F) | the columns of `statistic_names` (norms, batch norm, activation, APoZ, Taylor, ...) |
    | `groups` | (N,) | only for a whole network: the position of each filter's group, 0, 1, 2, ... |

    ## Rewards
    `reward(outcome).value`, unitless, for what the mask does to the network.

    ## Start and end
    `reset` shows the filters. The episode terminates after its one step; it is never truncated.

    ## Arguments
    task: a `LayerTask` (one group) or a `OneShotTask` (all groups of a network).
    reward: a pure function of an `Outcome`.

    ## Info
    `statistic_names` and `group` (its name; "network" for all groups). After the step also `accuracy`, `accuracy_drop`,
    `kept_fraction`, `macs_fraction`, `params_fraction`, `images` seen and the reward's terms.

    ## Version history
    v0: first version. Until keepdrop 0.1.0 a whole network was decided group by group, observed with a key `valid`.
    """

    metadata = {"render_modes": []}

    def __init__(self, task: DecisionTask, reward: RewardFunction) -> None:
        self.task = task
        self.reward = reward
        self.statistic_names = STATISTIC_NAMES
        shown, decided = _spaces(task)
        self.observation_space, self.action_space = cast(Any, shown), cast(Any, decided)
        self._over = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Show the filters."""
        super().reset(seed=seed, options=options)
        self._over = False
        return self._observe(), _info(self.task)

    def step(self, action: NDArray[np.int8]) -> tuple[Observations, float, bool, bool, dict[str, Any]]:
        """Decide."""
        if self._over:
            raise RuntimeError("the episode is over; call reset() before the next step.")
        (outcome,) = self.task.outcomes(_masks(self.task, np.asarray(action)[None]))
        self._over = True
        reward = self.reward(outcome)
        info = _info(self.task) | _facts(outcome, reward, self.task.n_images)
        return self._observe(), float(reward.value), True, False, info

    def _observe(self) -> Observations:
        # A copy each time: what a caller does to an observation must not change the next one.
        return {key: value.copy() for key, value in self.task.observation.as_dict().items()}


class FilterPruningVectorEnv(VectorEnv[Observations, NDArray[np.int8], NDArray[Any]]):
    """M episodes of `FilterPruningEnv` side by side, their masks evaluated together on common images.

    Every step takes M masks; all M episodes begin and end together. After a step the next observation is already that
    of new episodes (`AutoresetMode.SAME_STEP`; the default would make every second step of a one-step episode a no-op).

    Args:
        task: a `LayerTask` or a `OneShotTask`.
        reward: a pure function of an `Outcome`.
        num_envs: M.
        images_per_step: reward images drawn afresh for each step, the same ones for all M masks (common random
            numbers); None takes the whole reward split. `reset(seed=...)` sets what is drawn; with a list of seeds
            the first one counts.

    Infos are those of Gymnasium's own vector environments: an array (M,) per key, `final_obs` and `final_info` after
    the step. The numbers of `FilterPruningEnv`'s step stand beside them at the top as well. The base accuracy
    behind `accuracy_drop` is of the same images. Observations are read-only views.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self, task: DecisionTask, reward: RewardFunction, num_envs: int = 16, images_per_step: int | None = None
    ) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}; expected at least 1 mask per step.")
        if images_per_step is not None and images_per_step < 1:
            raise UserError(f"images_per_step is {images_per_step}; expected 1 or more, or null for all reward images.")
        self.task = task
        self.reward = reward
        self.num_envs = num_envs
        self.images_per_step = images_per_step
        self.statistic_names = STATISTIC_NAMES
        self.single_observation_space, self.single_action_space = _spaces(task)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Show the filters to every episode; `seed` chooses the images of the following steps."""
        super().reset(seed=seed[0] if isinstance(seed, list) else seed, options=options)
        return self._observe(), self._infos([_info(self.task)] * self.num_envs)

    def step(
        self, actions: NDArray[np.int8]
    ) -> tuple[Observations, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Decide in every episode: masks (M, N)."""
        actions = np.asarray(actions)
        if actions.shape[:1] != (self.num_envs,):
            raise ValueError(f"actions of shape {actions.shape} came, expected {self.num_envs}: one for each episode.")
        masks_MN, images = _masks(self.task, actions), self._drawn()
        # Read-only, not M copies.
        last = {key: np.broadcast_to(value, value.shape) for key, value in self.task.observation.as_dict().items()}
        rewards, infos = np.zeros(self.num_envs), []
        for i, outcome in enumerate(self.task.outcomes(masks_MN, images)):
            reward = self.reward(outcome)
            rewards[i] = reward.value
            facts = _facts(outcome, reward, len(images))
            infos.append(_info(self.task) | facts | {"final_obs": last, "final_info": _info(self.task) | facts})
        ended = np.ones(self.num_envs, dtype=bool)
        return self._observe(), rewards, ended, np.zeros_like(ended), self._infos(infos)

    def _drawn(self) -> torch.Tensor:
        """The reward images of one step, (B,) int64."""
        total = self.task.n_images
        size = min(self.images_per_step or total, total)
        if size == total:
            return torch.arange(total)
        return torch.from_numpy(np.sort(self.np_random.choice(total, size, replace=False)))

    def _infos(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
        """Gymnasium's form: an array (M,) per key, and who has it as `_key`."""
        joined: dict[str, Any] = {}
        for i, info in enumerate(infos):
            joined = self._add_info(joined, info, i)
        return joined

    def _observe(self) -> Observations:
        # Read-only views: all episodes of a step see the same filters, and M copies of them would be waste.
        seen = self.task.observation.as_dict()
        return {key: np.broadcast_to(value, (self.num_envs, *value.shape)) for key, value in seen.items()}


def make_env(
    model: nn.Module | None = None,
    splits: Splits | None = None,
    reward: RewardFunction | None = None,
    group: str | None = None,
    layers: Sequence[str] | None = None,
    settings: EvaluationSettings | None = None,
    repair: ReconstructionSettings | None = None,
    seed: int = 0,
) -> FilterPruningEnv:
    """Entry point of the id `keepdrop.envs.registration:keepdrop/FilterPruning-v0` in `gymnasium.make(id, ...)`.

    Args:
        model: a trained CNN.
        splits: fit, reward and report images (`keepdrop.envs.data.splits`).
        reward: a pure function of an `Outcome`.
        group: the filter group to decide on; None decides on the whole network.
        layers: names or globs of the groups of a whole network; None means all.
        settings: how masks are evaluated. `compensate` also says whether a whole network is repaired after the cut.
        repair: how, for a whole network; None means `ReconstructionSettings()`. Coarser settings make steps faster.
        seed: chooses the images behind statistics, compensation and repair.

    Raises:
        UserError: an argument that is missing, or one that has no part in the chosen form.
    """
    missing = [name for name, value in (("model", model), ("splits", splits), ("reward", reward)) if value is None]
    if missing or model is None or splits is None or reward is None:
        raise UserError(
            f"keepdrop/FilterPruning-v0 was made without {', '.join(missing)}; expected "
            'gymnasium.make("keepdrop.envs.registration:keepdrop/FilterPruning-v0", model=cnn, splits=splits, '
            'reward=TryAndLearn(0.02), group="conv2").'
        )
    for name, value in (("layers", layers), ("repair", repair)):
        if group is not None and value is not None:
            raise UserError(f"{name} is for a whole network, but group={group!r} was given as well; leave one out.")
    task = PruningTask(model, splits, settings=settings, layers=layers, seed=seed)
    if group is not None:
        return FilterPruningEnv(task.layer(group), reward)
    if repair is not None and not task.settings.compensate:
        raise UserError("repair was given, but settings.compensate is False, which leaves networks as cut; drop one.")
    usual = ReconstructionSettings() if task.settings.compensate else None
    return FilterPruningEnv(OneShotTask(task, repair or usual), reward)


def make_vector_env(num_envs: int = 16, images_per_step: int | None = None, **arguments: Any) -> FilterPruningVectorEnv:
    """Entry point of the same id in `gymnasium.make_vec(id, num_envs=M, ...)`; arguments as for `make_env`."""
    env = make_env(**arguments)
    return FilterPruningVectorEnv(env.task, env.reward, num_envs, images_per_step)


def _info(task: DecisionTask) -> dict[str, Any]:
    return {"statistic_names": STATISTIC_NAMES, "group": task.name}


def _spaces(task: DecisionTask) -> tuple[spaces.Dict, spaces.MultiBinary]:
    boxes: dict[str, spaces.Space[Any]] = {
        key: spaces.Box(-np.inf, np.inf, value.shape, np.float32) for key, value in task.observation.as_dict().items()
    }
    return spaces.Dict(boxes), spaces.MultiBinary(task.n_filters)


def _masks(task: DecisionTask, actions: NDArray[Any]) -> torch.Tensor:
    """Actions as masks (M, N) bool."""
    if actions.ndim != 2 or actions.shape[1] != task.n_filters:
        raise ValueError(
            f"an action of shape {actions.shape[1:]} came, expected ({task.n_filters},): one bit per filter."
        )
    return torch.from_numpy(actions != 0)


def _facts(outcome: Outcome, reward: Reward, n_images: int) -> dict[str, float]:
    return {
        "accuracy": outcome.pruned_accuracy,
        "accuracy_drop": outcome.accuracy_drop,
        "kept_fraction": outcome.kept_fraction,
        "macs_fraction": outcome.macs_fraction,
        "params_fraction": outcome.params_fraction,
        "images": float(n_images),
        **reward.terms,
    }
