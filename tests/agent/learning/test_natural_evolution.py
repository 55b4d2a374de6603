"""The network policy and its training: gradients against enumeration, and a problem with a known answer."""

import math

import numpy as np
import pytest
import torch
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings, NetworkTrainer, utilities
from keepdrop.agent.policies.network import NetworkPolicy
from keepdrop.errors import UserError

NAMES = ("l1", "useful")
SIZES = (6, 10, 4)


def observation(seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = sum(SIZES)
    return {
        "weights": torch.randn(n, 5, generator=generator),
        "statistics": torch.randn(n, len(NAMES), generator=generator),
        "groups": torch.repeat_interleave(torch.arange(len(SIZES)).float(), torch.tensor(SIZES)),
    }


def policy(**arguments):
    return NetworkPolicy(len(SIZES), len(NAMES), statistic_names=NAMES, **arguments)


def keep_half(scores):
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[: len(scores) // 2]] = True
    return mask


class NetworkEnv:
    """M one-step episodes over a whole network; keeping the useful filters of the second group pays."""

    def __init__(self, num_envs=8):
        self.num_envs, self.seen = num_envs, observation()
        useful = torch.zeros(sum(SIZES))
        useful[6:16] = 1.0 + self.seen["statistics"][6:16, 1].clamp(-0.9, 0.9)
        self.worth = useful.double()

    def reset(self, *, seed=None, options=None):
        return {key: np.broadcast_to(rows.numpy(), (self.num_envs, *rows.shape)) for key, rows in self.seen.items()}, {}

    def step(self, actions):
        rewards = torch.from_numpy(actions.astype(np.float64)) @ self.worth
        ended = np.ones(self.num_envs, dtype=bool)
        return self.reset()[0], rewards.numpy(), ended, ~ended, {"kept": actions.mean(1)}


def trainer(seed=0, masks=8, **settings):
    generator = torch.Generator().manual_seed(seed)
    return NetworkTrainer(NetworkEnv(masks), policy(), keep_half, NetworkAgentSettings(**settings), generator)


def test_the_first_order_is_the_warm_start_and_weights_move_whole_groups():
    seen = observation()
    net = policy()
    scores = net.scores(net.features(seen))
    for group in range(len(SIZES)):
        rows = seen["groups"] == group
        assert torch.equal(scores[rows].argsort(), seen["statistics"][rows, 0].argsort())
    vector = net.parameter_vector()
    vector[1] = math.log(3.0)
    moved = net.scores(net.features(seen), vector)
    rows = seen["groups"] == 1
    torch.testing.assert_close(moved[rows], scores[rows] / 3.0)
    torch.testing.assert_close(moved[~rows], scores[~rows])


def test_scores_follow_a_permutation_of_the_filters():
    seen, net = observation(), policy()
    net.load_vector(torch.randn(len(net.parameter_vector()), generator=torch.Generator().manual_seed(5)).double())
    order = torch.cat([torch.randperm(6), 6 + torch.randperm(10), 16 + torch.randperm(4)])
    shuffled = {key: rows[order] for key, rows in seen.items()}
    torch.testing.assert_close(net.scores(net.features(shuffled)), net.scores(net.features(seen))[order])


def test_an_observation_of_another_network_is_refused_with_both_numbers():
    seen = observation()
    seen["groups"] = torch.zeros(sum(SIZES))
    with pytest.raises(ValueError, match=r"reads 3 groups .* but 1"):
        policy().features(seen)
    with pytest.raises(UserError, match="warm_start is 'taylor'; expected one of the statistics: l1, useful"):
        policy(warm_start="taylor")


def test_utilities_have_mean_zero_keep_the_order_and_share_ties():
    rewards = torch.tensor([0.1, 5.0, -3.0, 5.0, 2.0, 0.0]).double()
    shaped = utilities(rewards)
    assert abs(float(shaped.sum())) < 1e-12
    assert shaped[1] == shaped[3] == shaped.max() and shaped[4] >= shaped[0] >= shaped[2]
    assert (
        torch.equal(utilities(torch.ones(6).double()), torch.zeros(6).double())
        or utilities(torch.ones(6)).abs().max() < 1e-12
    )
    torch.testing.assert_close(utilities(rewards * 100 - 7), shaped)


def test_the_estimate_is_the_gradient_of_the_expected_reward():
    """E[u(theta)] of a linear reward a . theta has the gradient a: the plain estimator, antithetic pairs, finds it."""
    slope = torch.tensor([1.0, -2.0, 0.5]).double()
    scale = torch.tensor([0.3, 0.5, 1.0]).double()
    half = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.cat([half, -half])
    rewards = (scale * noise) @ slope
    # d/d mean of log Normal is noise / scale; the natural gradient multiplies by scale^2.
    torch.testing.assert_close((rewards @ (noise / scale)) / len(noise), slope, rtol=0.05, atol=0.02)


def test_training_finds_where_the_network_can_be_cut_and_which_statistic_matters():
    one = trainer(updates=60, weight_scale=0.5, mix_scale=0.3)
    worth = one.venv.worth
    before = float((one.mask().double() * worth).sum())
    while not one.done:
        metrics = one.step()
    best = float(worth.sort(descending=True).values[:10].sum())
    assert float((one.mask().double() * worth).sum()) > 0.97 * best > before
    assert one.policy.log_weight[1] > one.policy.log_weight[0] and one.policy.mix[1] > 0
    assert {"reward_mean", "reward_max", "scale", "info/kept"} <= set(metrics)
    assert one.best.masks[0].reward == pytest.approx(best, rel=0.03)


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole, first, second = (trainer(updates=6) for _ in range(3))
    for _ in range(6):
        whole.step()
    for _ in range(3):
        first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    while not second.done:
        second.step()
    assert torch.equal(second.policy.parameter_vector(), whole.policy.parameter_vector())
    assert torch.equal(second.scale, whole.scale) and second.history == whole.history
    assert [m.reward for m in second.best.masks] == [m.reward for m in whole.best.masks]


def test_a_scale_of_zero_keeps_the_order():
    one = trainer(updates=5, mix_scale=0.0)
    while not one.done:
        one.step()
    assert torch.equal(one.policy.mix.detach(), policy().mix.detach())


def test_the_noise_falls_to_the_wished_fraction_where_nothing_is_learned():
    one = trainer(updates=5, anneal=0.2, scale_lr=0.0)
    seen = [one.step()["scale"] for _ in range(5)]
    assert seen == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    still = trainer(updates=2, anneal=1.0, scale_lr=0.0)
    assert [still.step()["scale"] for _ in range(2)] == pytest.approx([0.5, 0.5])
    with pytest.raises(UserError, match=r"anneal is 0\.0, but it must be above 0 and at most 1"):
        NetworkAgentSettings(anneal=0.0)


def test_settings_and_environments_are_checked():
    with pytest.raises(ValueError, match="takes 5 masks per step; expected an even number from 4"):
        trainer(masks=5)
    with pytest.raises(UserError, match="above 0"):
        NetworkAgentSettings(weight_scale=0.0)
    with pytest.raises(UserError, match="at least 0 and 1"):
        NetworkAgentSettings(updates=-1)
