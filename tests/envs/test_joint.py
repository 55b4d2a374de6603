"""All groups in one decision: the same numbers as cutting and counting by hand."""

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from judged import make_task
from keepdrop.envs.cost import count_cost
from keepdrop.envs.filter_pruning import FilterPruningEnv, FilterPruningVectorEnv
from keepdrop.envs.joint import JointTask
from keepdrop.envs.reconstruction import ReconstructionSettings
from keepdrop.rewards.errors import UserError
from keepdrop.rewards.priced import Priced

REPAIR = ReconstructionSettings(images=64)


def _masks(joint, count=3):
    masks = torch.rand(count, joint.n_filters, generator=torch.Generator().manual_seed(0)) < 0.7
    for group, start in zip(joint.groups, _starts(joint), strict=True):
        masks[:, start] = True
        assert group.n_filters > 1
    return masks


def _starts(joint):
    sizes = [group.n_filters for group in joint.groups]
    return np.cumsum([0, *sizes[:-1]]).tolist()


@pytest.mark.parametrize("repair", [None, REPAIR])
def test_outcomes_are_those_of_the_network_that_is_cut(repair):
    joint = JointTask(make_task(), repair)
    masks, some = _masks(joint), torch.arange(0, 200, 2)
    images, labels = joint.task.reward_images
    for keep, outcome in zip(masks, joint.outcomes(masks, some), strict=True):
        model = joint.cut(keep).eval()
        with torch.no_grad():
            right = int((model(images[some]).argmax(1) == labels[some]).sum())
        assert outcome.pruned_accuracy == right / len(some)
        cost = count_cost(model, images[:1])
        assert (outcome.pruned_macs, outcome.pruned_params) == (cost.macs, cost.params)
        assert outcome.n_kept == int(keep.sum()) and outcome.n_filters == joint.n_filters


def test_observations_stand_group_after_group():
    joint = JointTask(make_task(), None)
    seen = joint.observation.as_dict()
    assert seen["weights"].shape[0] == seen["statistics"].shape[0] == len(seen["groups"]) == joint.n_filters
    for position, layer in enumerate(joint.layers):
        rows = seen["groups"] == position
        own = layer.observation
        np.testing.assert_array_equal(seen["statistics"][rows], own.statistics)
        np.testing.assert_array_equal(seen["weights"][rows][:, : own.weights.shape[1]], own.weights)
        assert not seen["weights"][rows][:, own.weights.shape[1] :].any()


@pytest.mark.filterwarnings("ignore:.*A Box observation space m..imum value is -?infinity:UserWarning")
def test_it_is_a_gymnasium_environment():
    joint = JointTask(make_task(), REPAIR)
    env = FilterPruningEnv(joint, Priced(0.1))
    # A random action may empty a group, which is refused.
    env.action_space.sample = lambda **_: np.ones(joint.n_filters, np.int8)
    check_env(env, skip_render_check=True)
    venv = FilterPruningVectorEnv(joint, Priced(0.1), num_envs=2, images_per_step=50)
    venv.reset(seed=0)
    masks = _masks(joint, 2)
    _, rewards, terminated, _, infos = venv.step(masks.numpy().astype(np.int8))
    assert terminated.all() and np.isfinite(rewards).all() and infos["group"][0] == "network"


def test_masks_join_and_part():
    joint = JointTask(make_task(), None)
    keep = _masks(joint, 1)[0]
    parts = {group.name: part for group, part in joint.choices(keep).items()}
    assert torch.equal(joint.joined(parts), keep)


def test_an_emptied_group_is_named():
    joint = JointTask(make_task(), None)
    keep = torch.ones(joint.n_filters, dtype=torch.bool)
    keep[: joint.groups[0].n_filters] = False
    with pytest.raises(UserError, match=f"{joint.groups[0].name!r} keeps none"):
        joint.outcomes(keep[None])
