"""The environments keep Gymnasium's contract; M masks at once are worth what each is alone; an agent learns."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from judged import MASKED, QUICK, make_task, trained
from keepdrop.agent.learning.trainer import AgentSettings, train_agent
from keepdrop.agent.policies.set_policy import SetPolicy
from keepdrop.envs.filter_pruning import FilterPruningEnv, FilterPruningVectorEnv
from keepdrop.envs.observation import STATISTIC_NAMES
from keepdrop.envs.sequential import SequentialTask
from keepdrop.errors import UserError
from keepdrop.rewards.try_and_learn import TryAndLearn

REWARD = TryAndLearn(0.2)
FACTS = {"accuracy", "accuracy_drop", "kept_fraction", "macs_fraction", "params_fraction", "images", "psi", "phi"}
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
    env = FilterPruningEnv(task.layer("conv2") if form == "layer" else SequentialTask(task), REWARD)
    # An action of the space may keep nothing, which is refused: the checker samples, so give it a space that cannot.
    env.action_space.sample = lambda **_: np.ones(env.action_space.n, np.int8)
    check_env(env, skip_render_check=True)


def test_gymnasium_make_takes_a_live_network_and_can_make_it_again():
    model, splits = trained()
    env = gymnasium.make(ID, model=model, splits=splits, reward=REWARD, settings=MASKED)
    assert env.unwrapped.layer.task.model is model  # a live network is not copied
    env.reset(seed=0)
    for _ in range(3):
        env.step(np.ones(12, np.int8))
    again = env.spec.make()
    assert isinstance(again.unwrapped, FilterPruningEnv)


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
    assert set(info) == FACTS | {"statistic_names", "group"}
    with pytest.raises(RuntimeError, match="episode is over; call reset"):
        env.step(mask)


def test_whole_network_decides_group_after_group():
    network = SequentialTask(make_task())
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


def test_observations_are_the_callers_own():
    env = FilterPruningEnv(make_task().layer("conv2"), REWARD)
    first, _ = env.reset()
    expected = {key: value.copy() for key, value in first.items()}
    for value in first.values():
        value[:] = 7
    assert all(np.array_equal(env.reset()[0][key], value) for key, value in expected.items())


def assert_same(ours, theirs):
    """Equal in value and, for arrays, in type; dictionaries and arrays of objects item by item."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, np.ndarray) and theirs.dtype == object:
        assert ours.shape == theirs.shape
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert np.array_equal(ours, theirs)
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype


@pytest.mark.parametrize("settings", [MASKED, QUICK], ids=["masked", "compensated"])
@pytest.mark.parametrize("form", ["layer", "network"])
def test_vector_environment_equals_single_ones(form, settings):
    """Gymnasium's own vector of M single environments, step by step, for two episodes."""
    task = make_task(settings)
    layer = task.layer("conv2") if form == "layer" else SequentialTask(task)
    ours = FilterPruningVectorEnv(layer, REWARD, num_envs=4)
    theirs = SyncVectorEnv(
        [lambda: FilterPruningEnv(layer, REWARD) for _ in range(4)], autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    assert_same(dict(enumerate(ours.reset(seed=0))), dict(enumerate(theirs.reset(seed=0))))
    rng = np.random.default_rng(0)
    n_steps = 1 if form == "layer" else 3
    for step in range(2 * n_steps):
        actions = rng.integers(0, 2, ours.action_space.shape).astype(np.int8)
        actions[:, 0] = 1
        (*result, infos), (*expected, their_infos) = ours.step(actions), theirs.step(actions)
        assert_same(dict(enumerate(result)), dict(enumerate(expected)))
        last = (step + 1) % n_steps == 0
        assert result[2].all() == last and not result[3].any()
        # The last step's numbers stand at the top as well, where plain scripts look for them.
        extra = set(infos) - set(their_infos)
        assert {key for key in extra if not key.startswith("_")} == (FACTS if last else set())
        assert_same({key: infos[key] for key in their_infos}, their_infos)
        assert all(np.array_equal(infos[key], infos["final_info"][key]) for key in extra)


def test_the_next_observation_is_the_first_of_new_episodes():
    network = SequentialTask(make_task())
    env = FilterPruningVectorEnv(network, REWARD, num_envs=2)
    shown = [env.reset()[0]]
    for _ in range(3):
        observation, *_, infos = env.step(np.ones((2, 12), np.int8))
        shown.append(observation)
    assert [int(each["valid"][0].sum()) for each in shown] == [8, 10, 12, 8]
    assert infos["final_obs"][1]["valid"].sum() == 12
    assert list(infos["group"]) == ["conv1"] * 2 and list(infos["final_info"]["group"]) == ["conv3"] * 2
    env.step(np.ones((2, 12), np.int8))
    assert env.reset()[0]["valid"][0].sum() == 8  # a reset in the middle begins anew


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
    assert not all(np.array_equal(a, b) for a, b in zip(first, rewards(2), strict=True))


def test_drawn_images_are_the_base_ones_as_well():
    """Keeping everything loses nothing on whatever images are drawn, though their accuracy differs."""
    env = FilterPruningVectorEnv(make_task().layer("conv1"), REWARD, num_envs=2, images_per_step=20)
    env.reset(seed=0)
    infos = [env.step(np.ones((2, 8), np.int8))[-1] for _ in range(8)]
    assert all((each["accuracy_drop"] == 0).all() for each in infos)
    assert len({each["accuracy"][0] for each in infos}) > 1
    whole = FilterPruningVectorEnv(env.layer, REWARD, num_envs=2, images_per_step=10**6)
    whole.reset(seed=0)
    assert whole.step(np.ones((2, 8), np.int8))[-1]["accuracy"][0] == env.layer.task.base.accuracy


def test_a_refused_action_does_not_count():
    env = FilterPruningVectorEnv(SequentialTask(make_task()), REWARD, num_envs=2)
    env.reset()
    actions = np.ones((2, 12), np.int8)
    narrow = actions.copy()
    narrow[1, :8] = 0  # only bits past conv1's width are set
    with pytest.raises(ValueError, match="an action keeps no filter of 'conv1'"):
        env.step(narrow)
    assert [env.step(actions)[2].all() for _ in range(3)] == [False, False, True]


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
    with pytest.raises(UserError, match="images_per_step is 0; expected 1 or more, or null"):
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
    """A fresh process; registering alone must not load torch."""
    code = (
        "import sys, gymnasium\n"
        f"gymnasium.envs.registration._find_spec({ID!r})\n"
        "assert 'torch' not in sys.modules\n"
        "for make in (gymnasium.make, gymnasium.make_vec):\n"
        "    try:\n"
        f"        make({ID!r})\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("keepdrop/FilterPruning-v0 was made without model, splits, reward") == 2


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
