"""Gymnasium environments: one keep/drop bit per filter, one decision a filter group.

Shapes: M masks (parallel episodes), N filters, D weights a filter, F statistics a filter.
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
from .adaptive import AdaptiveSettings
from .data.splits import Splits
from .observation import STATISTIC_NAMES
from .search_judge import adaptive_outcomes, check_adaptive
from .sequential import SequentialTask
from .task import EvaluationSettings, LayerTask, PruningTask

Observations = dict[str, NDArray[np.float32]]


class FilterPruningEnv(gymnasium.Env[Observations, NDArray[np.int8]]):
    """Keep or drop every filter of one group (the paper's form), or of each group of a network in turn.

    ## Action space
    `MultiBinary(N)`: 1 keeps a filter, 0 drops it. An action that keeps nothing is refused with a ValueError.
    In the whole-network form N is the widest group's; entries past the current group's width are ignored.

    ## Observation space
    `Dict`, all float32:

    | key | shape | meaning |
    |---|---|---|
    | `weights` | (N, D) | the filters of the group's convolution, flattened; rows past its width are 0 |
    | `statistics` | (N, F) | the columns of `statistic_names` (norms, batch norm, activation, APoZ, Taylor, ...) |
    | `valid` | (N,) | only in the whole-network form: 1 where a filter exists, 0 where a row pads |

    ## Rewards
    `reward(outcome).value`, unitless, for what the masks together do to the network: at the one step of a one-layer
    episode, at the last step of a whole-network episode (0 before).

    ## Start and end
    `reset` shows the first group. The episode terminates after the last group; it is never truncated.

    ## Arguments
    layer: a `LayerTask` (one decision) or a `SequentialTask` (one decision a group).
    reward: a pure function of an `Outcome`.

    ## Info
    `accuracy`, `accuracy_drop`, `kept_fraction`, `macs_fraction`, `params_fraction`, `images` seen and the reward's
    terms, at the last step. `statistic_names` and `group` at every step.

    ## Version history
    v0: first version.
    """

    metadata = {"render_modes": []}

    def __init__(self, layer: LayerTask | SequentialTask, reward: RewardFunction) -> None:
        self.layer = layer
        self.reward = reward
        self.statistic_names = STATISTIC_NAMES
        shown, decided = _spaces(layer)
        self.observation_space, self.action_space = cast(Any, shown), cast(Any, decided)
        self._masks: list[torch.Tensor] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Show the first group."""
        super().reset(seed=seed, options=options)
        self._masks = []
        return self._observe(0), _info(self.layer, 0)

    def step(self, action: NDArray[np.int8]) -> tuple[Observations, float, bool, bool, dict[str, Any]]:
        """Decide one group."""
        position = len(self._masks)
        if position >= _n_decisions(self.layer):
            raise RuntimeError("the episode is over; call reset() before the next step.")
        self._masks.append(_checked_masks(self.layer, position, np.asarray(action)[None]))
        if len(self._masks) < _n_decisions(self.layer):
            return self._observe(position + 1), 0.0, False, False, _info(self.layer, position + 1)
        outcome = _outcomes(self.layer, self._masks, None)[0]
        reward = self.reward(outcome)
        info = _info(self.layer, position) | _facts(outcome, reward, self.layer.n_images)
        return self._observe(position), float(reward.value), True, False, info

    def _observe(self, position: int) -> Observations:
        # A copy each time: what a caller does to an observation must not change the next one.
        return {key: value.copy() for key, value in _observation(self.layer, position).items()}


class FilterPruningVectorEnv(VectorEnv[Observations, NDArray[np.int8], NDArray[Any]]):
    """M episodes of `FilterPruningEnv` side by side, their masks evaluated together on common images.

    Every step takes M masks; all M episodes begin and end together. After a terminated step the next observation is
    already the first one of new episodes (`AutoresetMode.SAME_STEP`; the default would make every second step of a
    one-step episode a no-op).

    Args:
        layer: a `LayerTask` or a `SequentialTask`.
        reward: a pure function of an `Outcome`.
        num_envs: M.
        images_per_step: reward images drawn afresh for each evaluation, the same ones for all M masks (common random
            numbers); None takes the whole reward split. `reset(seed=...)` sets what is drawn; with a list of seeds
            the first one counts.
        adaptive: spend these images chunk by chunk, on a mask only until its rank is settled (`adaptive`).

    Infos are those of Gymnasium's own vector environments: an array (M,) a key, `final_obs` and `final_info` at the
    last step. The numbers of `FilterPruningEnv`'s last step stand beside them at the top as well. The base accuracy
    behind `accuracy_drop` is of the same images. Observations are read-only views.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        layer: LayerTask | SequentialTask,
        reward: RewardFunction,
        num_envs: int = 16,
        images_per_step: int | None = None,
        adaptive: AdaptiveSettings | None = None,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}; expected at least 1 mask a step.")
        if images_per_step is not None and images_per_step < 1:
            raise UserError(f"images_per_step is {images_per_step}; expected 1 or more, or null for all reward images.")
        self.layer = layer
        self.reward = reward
        self.num_envs = num_envs
        check_adaptive(layer, adaptive)
        self.images_per_step = images_per_step
        self.adaptive = adaptive
        self.statistic_names = STATISTIC_NAMES
        self.single_observation_space, self.single_action_space = _spaces(layer)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._masks: list[torch.Tensor] = []

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Show the first group to every episode; `seed` chooses the images of the following steps."""
        super().reset(seed=seed[0] if isinstance(seed, list) else seed, options=options)
        self._masks = []
        return self._observe(0), self._infos([_info(self.layer, 0)] * self.num_envs)

    def step(
        self, actions: NDArray[np.int8]
    ) -> tuple[Observations, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Decide one group in every episode: masks (M, N)."""
        actions = np.asarray(actions)
        if actions.shape[:1] != (self.num_envs,):
            raise ValueError(f"actions of shape {actions.shape} came, expected {self.num_envs}: one for each episode.")
        masks = [*self._masks, _checked_masks(self.layer, len(self._masks), actions)]
        over = len(masks) == _n_decisions(self.layer)
        self._masks = [] if over else masks
        infos = [_info(self.layer, len(self._masks)) for _ in range(self.num_envs)]
        rewards = self._settle(masks, infos) if over else np.zeros(self.num_envs)
        ended = np.full(self.num_envs, over)
        return self._observe(len(self._masks)), rewards, ended, np.zeros_like(ended), self._infos(infos)

    def _settle(self, masks: list[torch.Tensor], infos: list[dict[str, Any]]) -> NDArray[np.float64]:
        """Rewards (M,) of full episodes; adds to `infos` what they did."""
        last = len(masks) - 1
        rewards, seen = np.zeros(self.num_envs), _observation(self.layer, last)
        shown = {key: np.broadcast_to(value, value.shape) for key, value in seen.items()}  # read-only, not M copies
        for i, (outcome, n_images) in enumerate(zip(*self._judge(masks), strict=True)):
            reward = self.reward(outcome)
            facts = _facts(outcome, reward, n_images)
            infos[i] |= facts | {"final_obs": shown, "final_info": _info(self.layer, last) | facts}
            rewards[i] = reward.value
        return rewards

    def _infos(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
        """Gymnasium's form: an array (M,) a key, and who has it as `_key`."""
        joined: dict[str, Any] = {}
        for i, info in enumerate(infos):
            joined = self._add_info(joined, info, i)
        return joined

    def _judge(self, masks: list[torch.Tensor]) -> tuple[list[Outcome], list[int]]:
        """Outcomes of M masks, and the images spent on each."""
        total = self.layer.n_images
        size = min(self.images_per_step or total, total)
        if self.adaptive is not None and isinstance(self.layer, LayerTask):
            order = torch.from_numpy(self.np_random.permutation(total)[:size])
            return adaptive_outcomes(self.layer, self.reward, masks[0], order, self.adaptive)
        drawn = np.arange(total) if size == total else np.sort(self.np_random.choice(total, size, replace=False))
        return _outcomes(self.layer, masks, torch.from_numpy(drawn)), [size] * self.num_envs

    def _observe(self, position: int) -> Observations:
        # Read-only views: all episodes of a step see the same filters, and M copies of them would be waste.
        return {
            key: np.broadcast_to(value, (self.num_envs, *value.shape))
            for key, value in _observation(self.layer, position).items()
        }


def make_env(
    model: nn.Module | None = None,
    splits: Splits | None = None,
    reward: RewardFunction | None = None,
    group: str | None = None,
    layers: Sequence[str] | None = None,
    settings: EvaluationSettings | None = None,
    seed: int = 0,
) -> FilterPruningEnv:
    """Entry point of the id `keepdrop.envs.registration:keepdrop/FilterPruning-v0` in `gymnasium.make(id, ...)`.

    Args:
        model: a trained CNN.
        splits: fit, reward and report images (`keepdrop.envs.data.splits`).
        reward: a pure function of an `Outcome`.
        group: the filter group of a one-layer episode; None plays the whole network, one decision a group.
        layers: globs of the groups of a whole-network episode; None means all.
        settings: how masks are judged.
        seed: chooses the images behind statistics and compensation.
    """
    missing = [name for name, value in (("model", model), ("splits", splits), ("reward", reward)) if value is None]
    if missing or model is None or splits is None or reward is None:
        raise UserError(
            f"keepdrop/FilterPruning-v0 was made without {', '.join(missing)}; expected "
            'gymnasium.make("keepdrop.envs.registration:keepdrop/FilterPruning-v0", model=cnn, splits=splits, '
            'reward=TryAndLearn(0.02), group="conv2").'
        )
    task = PruningTask(model, splits, settings=settings, layers=layers, seed=seed)
    return FilterPruningEnv(SequentialTask(task) if group is None else task.layer(group), reward)


def make_vector_env(num_envs: int = 16, images_per_step: int | None = None, **arguments: Any) -> FilterPruningVectorEnv:
    """Entry point of the same id in `gymnasium.make_vec(id, num_envs=M, ...)`; arguments as `make_env`."""
    env = make_env(**arguments)
    return FilterPruningVectorEnv(env.layer, env.reward, num_envs, images_per_step)


def _n_decisions(layer: LayerTask | SequentialTask) -> int:
    return len(layer.layers) if isinstance(layer, SequentialTask) else 1


def _group_names(layer: LayerTask | SequentialTask) -> list[str]:
    return [each.group.name for each in layer.layers] if isinstance(layer, SequentialTask) else [layer.group.name]


def _info(layer: LayerTask | SequentialTask, position: int) -> dict[str, Any]:
    return {"statistic_names": STATISTIC_NAMES, "group": _group_names(layer)[position]}


def _observation(layer: LayerTask | SequentialTask, position: int) -> Observations:
    return layer.observation(position) if isinstance(layer, SequentialTask) else layer.observation.as_dict()


def _spaces(layer: LayerTask | SequentialTask) -> tuple[spaces.Dict, spaces.MultiBinary]:
    shown = _observation(layer, 0)
    boxes: dict[str, spaces.Space[Any]] = {
        key: spaces.Box(-np.inf, np.inf, value.shape, np.float32) for key, value in shown.items()
    }
    return spaces.Dict(boxes), spaces.MultiBinary(shown["weights"].shape[0])


def _checked_masks(layer: LayerTask | SequentialTask, position: int, actions: NDArray[Any]) -> torch.Tensor:
    width = _observation(layer, 0)["weights"].shape[0]
    if actions.ndim != 2 or actions.shape[1] != width:
        raise ValueError(f"an action of shape {actions.shape[1:]} came, expected ({width},): one bit per filter.")
    one = layer.layers[position] if isinstance(layer, SequentialTask) else layer
    masks = torch.from_numpy(actions[:, : one.n_filters] != 0)
    if not bool(masks.any(1).all()):
        raise ValueError(f"an action keeps no filter of {one.group.name!r}; keep at least one.")
    return masks


def _outcomes(
    layer: LayerTask | SequentialTask, masks: list[torch.Tensor], image_indices: torch.Tensor | None
) -> list[Outcome]:
    if isinstance(layer, SequentialTask):
        return layer.outcomes(masks, image_indices)
    return layer.outcomes(masks[0], image_indices)


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
