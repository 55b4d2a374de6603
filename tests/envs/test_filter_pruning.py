"""The environments keep Gymnasium's contract; M masks at once are worth what each is alone; an agent learns."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from digits_task import MASKED, QUICK, make_task, trained
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from keepdrop.agent.learning.trainer import AgentSettings, train_agent
from keepdrop.agent.policies.set_policy import SetPolicy
from keepdrop.envs.filter_pruning import FilterPruningEnv, FilterPruningVectorEnv
from keepdrop.envs.observation import STATISTIC_NAMES
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.task import EvaluationSettings
from keepdrop.errors import UserError
from keepdrop.rewards.try_and_learn import TryAndLearn

REWARD = TryAndLearn(0.2)
FACTS = {"accuracy", "accuracy_drop", "kept_fraction", "macs_fraction", "params_fraction", "images", "psi", "phi"}
ID = "keepdrop.envs.registration:keepdrop/FilterPruning-v0"
REPAIR = ReconstructionSettings(images=64, places=8)
N_FILTERS = {"layer": 10, "network": 30}


def decision(form, settings=MASKED):
    task = make_task(settings)
    if form == "layer":
        return task.layer("conv2")
    return OneShotTask(task, REPAIR if settings.compensate else None)


def some_masks(n_masks, n_filters):
    masks = np.random.default_rng(0).integers(0, 2, (n_masks, n_filters)).astype(np.int8)
    masks[:, [each for each in (0, 8, 18) if each < n_filters]] = 1  # one of each group, if all are decided
    return masks


# Weights and statistics have no bounds, and an infinite box is how Gymnasium spells that.
@pytest.mark.filterwarnings("ignore:.*A Box observation space m..imum value is -?infinity:UserWarning")
@pytest.mark.parametrize("form", ["layer", "network"])
def test_gymnasium_accepts_the_environment(form):
    env = FilterPruningEnv(decision(form, QUICK), REWARD)
    assert env.action_space.n == N_FILTERS[form]
    # An action of the space may keep nothing, which is refused: the checker samples, so give it a space that cannot.
    env.action_space.sample = lambda **_: np.ones(env.action_space.n, np.int8)
    check_env(env, skip_render_check=True)


def test_gymnasium_make_takes_a_live_network_and_can_make_it_again():
    model, splits = trained()
    env = gymnasium.make(ID, model=model, splits=splits, reward=REWARD, settings=MASKED)
    assert env.unwrapped.task.task.model is model  # a live network is not copied
    env.reset(seed=0)
    env.step(np.ones(30, np.int8))
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


def test_the_whole_network_is_one_terminated_step():
    network = decision("network", QUICK)
    env = FilterPruningEnv(network, REWARD)
    observation, info = env.reset(seed=0)
    assert observation["groups"].tolist() == [0] * 8 + [1] * 10 + [2] * 12
    assert info == {"statistic_names": STATISTIC_NAMES, "group": "network"}
    mask = some_masks(1, 30)[0]
    _, reward, terminated, truncated, info = env.step(mask)
    outcome = network.outcomes(torch.from_numpy(mask[None] != 0))[0]
    assert (reward, terminated, truncated) == (REWARD(outcome).value, True, False)
    assert set(info) == FACTS | {"statistic_names", "group"} and info["kept_fraction"] == mask.mean()


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
    layer = decision(form, settings)
    ours = FilterPruningVectorEnv(layer, REWARD, num_envs=4)
    theirs = SyncVectorEnv(
        [lambda: FilterPruningEnv(layer, REWARD) for _ in range(4)], autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    assert_same(dict(enumerate(ours.reset(seed=0))), dict(enumerate(theirs.reset(seed=0))))
    for _ in range(2):
        actions = some_masks(4, layer.n_filters)
        (*result, infos), (*expected, their_infos) = ours.step(actions), theirs.step(actions)
        assert_same(dict(enumerate(result)), dict(enumerate(expected)))
        assert result[2].all() and not result[3].any()
        # The last step's numbers stand at the top as well, where plain scripts look for them.
        extra = set(infos) - set(their_infos)
        assert {key for key in extra if not key.startswith("_")} == FACTS
        assert_same({key: infos[key] for key in their_infos}, their_infos)
        assert all(np.array_equal(infos[key], infos["final_info"][key]) for key in extra)


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
    whole = FilterPruningVectorEnv(env.task, REWARD, num_envs=2, images_per_step=10**6)
    whole.reset(seed=0)
    assert whole.step(np.ones((2, 8), np.int8))[-1]["accuracy"][0] == env.task.task.base.accuracy


def test_a_refused_action_does_not_end_the_episode():
    env = FilterPruningEnv(decision("network"), REWARD)
    env.reset()
    action = np.ones(30, np.int8)
    action[8:18] = 0
    with pytest.raises(ValueError, match="a mask of 'conv2' keeps no filter at all; keep at least one"):
        env.step(action)
    assert env.step(np.ones(30, np.int8))[2]


def test_memory_changes_no_reward_and_disturbs_no_stream():
    def made(memory):
        settings = EvaluationSettings(compensation_images=150, statistics_images=60, memory=memory)
        env = FilterPruningVectorEnv(make_task(settings).layer("conv2"), REWARD, 6, 100)
        env.reset(seed=4)
        return env

    with_memory, without = made(1024), made(0)
    for step in range(7):
        masks = np.random.default_rng(step % 3).integers(0, 2, (6, 10)).astype(np.int8)
        masks[:, 0], masks[5] = 1, masks[4]
        one, other = with_memory.step(masks), without.step(masks)
        assert np.array_equal(one[1], other[1])
        assert np.array_equal(one[4]["images"], other[4]["images"])
    # One of the 15 masks keeps everything: that is the network itself, and no evaluator is asked.
    assert len(with_memory.task.evaluator._memory) == 14 and len(without.task.evaluator._memory) == 0


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(10, np.int8), "a mask of 'conv2' keeps no filter at all; keep at least one"),
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
    with pytest.raises(UserError, match="num_envs is 0; expected at least 1 mask per step"):
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
    assert many.num_envs == 3 and many.reset()[0]["groups"].shape == (3, 30)


def test_a_network_made_by_its_id_is_repaired_as_a_cut_of_the_commands_is():
    model, splits = trained()

    def made(**arguments):
        return gymnasium.make(ID, model=model, splits=splits, reward=REWARD, **arguments).unwrapped.task

    assert made(settings=QUICK).repair == ReconstructionSettings()
    assert made(settings=QUICK, repair=REPAIR).repair == REPAIR
    assert made(settings=MASKED).repair is None
    assert made(settings=MASKED, layers=["conv[12]"]).n_filters == 18
    with pytest.raises(UserError, match=r"repair was given, but settings.compensate is False"):
        made(settings=MASKED, repair=REPAIR)
    for name, value in (("repair", REPAIR), ("layers", ["conv1"])):
        with pytest.raises(UserError, match=f"{name} is for a whole network, but group='conv1' was given as well"):
            made(group="conv1", **{name: value})


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
