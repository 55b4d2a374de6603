"""All groups in one decision: the same numbers as cutting and counting by hand."""

import numpy as np
import pytest
import torch
from digits_task import make_task
from gymnasium.utils.env_checker import check_env
from keepdrop.envs.filter_pruning import FilterPruningEnv, FilterPruningVectorEnv
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.rewards.priced import Priced

REPAIR = ReconstructionSettings(images=64)


def _masks(one_shot, count=3):
    masks = torch.rand(count, one_shot.n_filters, generator=torch.Generator().manual_seed(0)) < 0.7
    for group, start in zip(one_shot.groups, _starts(one_shot), strict=True):
        masks[:, start] = True
        assert group.n_filters > 1
    return masks


def _starts(one_shot):
    sizes = [group.n_filters for group in one_shot.groups]
    return np.cumsum([0, *sizes[:-1]]).tolist()


@pytest.mark.parametrize("repair", [None, REPAIR])
def test_outcomes_are_those_of_the_network_that_is_cut(repair):
    one_shot = OneShotTask(make_task(), repair)
    masks, some = _masks(one_shot), torch.arange(0, 200, 2)
    images, labels = one_shot.task.reward_images
    for keep, outcome in zip(masks, one_shot.outcomes(masks, some), strict=True):
        model = one_shot.cut(keep).eval()
        with torch.no_grad():
            right = int((model(images[some]).argmax(1) == labels[some]).sum())
        assert outcome.pruned_accuracy == right / len(some)
        cost = count_cost(model, images[:1])
        assert (outcome.pruned_macs, outcome.pruned_params) == (cost.macs, cost.params)
        assert outcome.n_kept == int(keep.sum()) and outcome.n_filters == one_shot.n_filters


def test_observations_stand_group_after_group():
    one_shot = OneShotTask(make_task(), None)
    seen = one_shot.observation.as_dict()
    assert seen["weights"].shape[0] == seen["statistics"].shape[0] == len(seen["groups"]) == one_shot.n_filters
    for position, layer in enumerate(one_shot.layers):
        rows = seen["groups"] == position
        own = layer.observation
        np.testing.assert_array_equal(seen["statistics"][rows], own.statistics)
        np.testing.assert_array_equal(seen["weights"][rows][:, : own.weights.shape[1]], own.weights)
        assert not seen["weights"][rows][:, own.weights.shape[1] :].any()


@pytest.mark.filterwarnings("ignore:.*A Box observation space m..imum value is -?infinity:UserWarning")
def test_it_is_a_gymnasium_environment():
    one_shot = OneShotTask(make_task(), REPAIR)
    env = FilterPruningEnv(one_shot, Priced(0.1))
    # A random action may empty a group, which is refused.
    env.action_space.sample = lambda **_: np.ones(one_shot.n_filters, np.int8)
    check_env(env, skip_render_check=True)
    venv = FilterPruningVectorEnv(one_shot, Priced(0.1), num_envs=2, images_per_step=50)
    venv.reset(seed=0)
    masks = _masks(one_shot, 2)
    _, rewards, terminated, _, infos = venv.step(masks.numpy().astype(np.int8))
    assert terminated.all() and np.isfinite(rewards).all() and infos["group"][0] == "network"


def test_masks_join_and_part():
    one_shot = OneShotTask(make_task(), None)
    keep = _masks(one_shot, 1)[0]
    parts = {group.name: part for group, part in one_shot.choices(keep).items()}
    assert torch.equal(one_shot.joined(parts), keep)


def test_an_emptied_group_is_named():
    one_shot = OneShotTask(make_task(), None)
    keep = torch.ones(one_shot.n_filters, dtype=torch.bool)
    keep[: one_shot.groups[0].n_filters] = False
    with pytest.raises(ValueError, match=f"a mask of {one_shot.groups[0].name!r} keeps no filter at all"):
        one_shot.outcomes(torch.stack([torch.ones_like(keep), keep]))
    with pytest.raises(ValueError, match=r"masks of the network have shape \(1, 29\), expected \(M, 30\)"):
        one_shot.outcomes(torch.ones(1, 29))
