import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from judged import MASKED, make_task, trained
from keepdrop.agent.policy import SetPolicy
from keepdrop.agent.trainer import AgentSettings, train_agent
from keepdrop.envs.filter_pruning import FilterPruningEnv, FilterPruningVectorEnv
from keepdrop.envs.observation import STATISTIC_NAMES
from keepdrop.envs.whole_network import NetworkTask
from keepdrop.rewards.errors import UserError
from keepdrop.rewards.try_and_learn import TryAndLearn

REWARD = TryAndLearn(0.2)
ID = "keepdrop.envs.registration:keepdrop/FilterPruning-v0"


def some_masks(n_masks, n_filters):
    masks = np.random.default_rng(0).integers(0, 2, (n_masks, n_filters)).astype(np.int8)
    masks[:, 0] = 1
    return masks


# Weights and statistics have no bounds, and an infinite box is how Gymnasium spells that.
@pytest.mark.filterwarnings("ignore:.*A Box observation space m..imum value is -?infinity:UserWarning")
@pytest.mark.parametrize("form", ["layer", "network"])
def test_gymnasium_accepts_the_environment(form):
    task = make_task()
    env = FilterPruningEnv(task.layer("conv2") if form == "layer" else NetworkTask(task), REWARD)
    # An action of the space may keep nothing, which is refused: the checker samples, so give it a space that cannot.
    env.action_space.sample = lambda **_: np.ones(env.action_space.n, np.int8)
    check_env(env, skip_render_check=True)


def test_one_layer_is_one_terminated_step():
    layer = make_task().layer("conv2")
    env = FilterPruningEnv(layer, REWARD)
    observation, info = env.reset(seed=0)
    assert observation["weights"].shape == (10, 72)
    assert observation["statistics"].shape == (10, len(STATISTIC_NAMES))
    assert info == {"statistic_names": STATISTIC_NAMES, "group": "conv2"}
    mask = some_masks(1, 10)[0]
    _, reward, terminated, truncated, info = env.step(mask)
    outcome = layer.outcomes(torch.from_numpy(mask[None] != 0))[0]
    assert (reward, terminated, truncated) == (REWARD(outcome).value, True, False)
    assert info["accuracy"] == outcome.pruned_accuracy
    assert {"psi", "phi", "macs_fraction", "kept_fraction", "accuracy_drop"} <= set(info)
    with pytest.raises(RuntimeError, match="episode is over; call reset"):
        env.step(mask)


def test_whole_network_decides_group_after_group():
    network = NetworkTask(make_task())
    env = FilterPruningEnv(network, REWARD)
    observation, _ = env.reset()
    masks = []
    for position, layer in enumerate(network.layers):
        assert observation["valid"].sum() == layer.n_filters
        action = some_masks(1, 12)[0]
        masks.append(torch.from_numpy(action[None, : layer.n_filters] != 0))
        observation, reward, terminated, _, info = env.step(action)
        assert terminated == (position == len(network.layers) - 1)
        assert terminated or reward == 0
    assert reward == REWARD(network.outcomes(masks)[0]).value
    assert info["group"] == network.layers[-1].group.name


def test_vector_environment_equals_single_ones():
    layer = make_task().layer("conv2")
    masks = some_masks(5, 10)
    env = FilterPruningVectorEnv(layer, REWARD, num_envs=5)
    observation, _ = env.reset(seed=0)
    again, rewards, terminated, truncated, infos = env.step(masks)
    assert terminated.all() and not truncated.any()
    for index, mask in enumerate(masks):
        single = FilterPruningEnv(layer, REWARD)
        single.reset()
        _, reward, _, _, info = single.step(mask)
        assert rewards[index] == reward
        assert infos["accuracy"][index] == info["accuracy"]
    # The same step begins new episodes: what is shown is their first observation.
    assert all(np.array_equal(again[key], observation[key]) for key in observation)
    assert env.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.SAME_STEP


def test_all_masks_of_a_step_see_the_same_images_and_a_seed_repeats_them():
    layer = make_task().layer("conv2")
    masks = np.repeat(some_masks(1, 10), 4, axis=0)

    def rewards(seed):
        env = FilterPruningVectorEnv(layer, REWARD, num_envs=4, images_per_step=20)
        env.reset(seed=seed)
        return [env.step(masks)[1] for _ in range(6)]

    first = rewards(1)
    assert all(len(set(step)) == 1 for step in first)
    assert len({step[0] for step in first}) > 1
    assert all(np.array_equal(a, b) for a, b in zip(first, rewards(1), strict=True))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(10, np.int8), "an action keeps no filter of 'conv2'; keep at least one"),
        (np.ones(9, np.int8), r"an action of shape \(9,\) came, expected \(10,\): one bit per filter"),
    ],
)
def test_bad_actions_are_refused(action, message):
    env = FilterPruningEnv(make_task().layer("conv2"), REWARD)
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step(action)


def test_bad_arguments_are_refused():
    layer = make_task().layer("conv2")
    with pytest.raises(UserError, match="images_per_step is 0; expected at least 1, or null"):
        FilterPruningVectorEnv(layer, REWARD, images_per_step=0)
    with pytest.raises(UserError, match="num_envs is 0; expected at least 1"):
        FilterPruningVectorEnv(layer, REWARD, num_envs=0)
    with pytest.raises(UserError, match=r"was made without model, splits, reward; expected gymnasium.make"):
        gymnasium.make(ID)
    with pytest.raises(ValueError, match=r"actions of shape \(3, 10\) came, expected 2: one for each episode"):
        FilterPruningVectorEnv(layer, REWARD, num_envs=2).step(some_masks(3, 10))


def test_made_by_its_id():
    model, splits = trained()
    env = gymnasium.make(ID, model=model, splits=splits, reward=REWARD, group="conv1", settings=MASKED)
    env.reset(seed=0)
    assert env.step(np.ones(8, np.int8))[1] == 0.0  # keeping everything scores exactly 0
    many = gymnasium.make_vec(ID, 3, model=model, splits=splits, reward=REWARD, settings=MASKED)
    assert many.num_envs == 3 and "valid" in many.reset()[0]


def test_known_to_gymnasium_without_importing_keepdrop():
    code = f"import gymnasium; gymnasium.make({ID!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "keepdrop/FilterPruning-v0 was made without model, splits, reward" in done.stderr


def test_an_agent_learns_in_it():
    layer = make_task().layer("conv3")
    env = FilterPruningVectorEnv(layer, REWARD, num_envs=8)
    env.reset(seed=0)
    policy = SetPolicy(len(STATISTIC_NAMES), statistic_names=STATISTIC_NAMES, warm_start="taylor")
    settings = AgentSettings(updates=25, patience=None)
    result = train_agent(env, policy, settings, torch.Generator().manual_seed(0))
    rewards = [metrics["reward_mean"] for metrics in result.history]
    assert sum(rewards[-5:]) > sum(rewards[:5])
    assert result.greedy_reward > 0
