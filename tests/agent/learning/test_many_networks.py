"""Policy gradient over many networks: mirrored exploration, its direction by hand, and learning that carries over."""

import pytest
import torch
from keepdrop.agent.learning.many_networks import (
    Experience,
    PolicyGradientSettings,
    PolicyScales,
    explore,
    improve,
)
from keepdrop.agent.policies.group_policy import GroupPolicy
from keepdrop.errors import UserError

NAMES, STATISTICS = ("wish", "planned"), ("l2",)


def untrained(rows):
    torch.manual_seed(0)
    policy = GroupPolicy(NAMES, STATISTICS, hidden=8)
    policy.normalise(rows)
    return policy


def rows_of(n_groups, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(n_groups, generator=draw), torch.full((n_groups,), -0.7)], 1)


def reward(rows, actions):
    """Best where the residuals are the wishes (without their mean) and the temper is 1.5."""
    wish = (rows[:, 0] - rows[:, 0].mean()).double()
    return -((actions[:, : len(rows)] - wish) ** 2).mean(1) - (actions[:, -1] - 1.5) ** 2


def tried(policy, rows, seed, samples=16):
    with torch.no_grad():
        mean = policy.action(rows).double()
    scale = PolicyScales(0.3, 0.2, 0.2).vector(len(rows), len(mean))
    actions = explore(mean, scale, samples, torch.Generator().manual_seed(seed))
    return Experience(rows, mean, scale, actions, reward(rows, actions))


def value(policy, rows):
    with torch.no_grad():
        return float(reward(rows, policy.action(rows)[None].double()))


def test_exploration_is_mirrored_and_as_wide_as_asked():
    mean, scale = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.1], dtype=torch.float64)
    actions = explore(mean, scale, 4000, torch.Generator().manual_seed(0))
    ahead, behind = actions.chunk(2)
    assert torch.allclose(ahead + behind, 2 * mean.double().expand_as(ahead))
    assert torch.allclose(ahead.std(0), scale, rtol=0.05)
    for odd in (0, 1, 3):
        with pytest.raises(ValueError, match="expected an even number"):
            explore(mean, scale, odd, torch.Generator())


def test_scales_stand_where_the_numbers_of_an_action_do():
    assert PolicyScales(0.3, 0.2, 0.1).vector(2, 6).tolist() == [0.3, 0.3, 0.2, 0.2, 0.2, 0.1]
    with pytest.raises(UserError, match="above 0"):
        PolicyScales(residual=0.0)


def test_the_direction_by_hand():
    """Two pairs: differences 2 and -1 of noises (1, 0) and (0, 2), over their root mean square sqrt(2.5)."""
    mean, scale = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    noise = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    actions = torch.cat([noise, -noise]) * scale
    rewards = torch.tensor([5.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    found = Experience(torch.zeros(1, 2), mean, scale, actions, rewards).direction
    assert torch.allclose(found, torch.tensor([2 * 1, -1 * 2], dtype=torch.float64) / 2 / 2.5**0.5)


def test_equal_rewards_point_nowhere():
    rows = rows_of(3, 0)
    seen = tried(untrained([rows]), rows, 0)
    still = Experience(rows, seen.mean, seen.scale, seen.actions, torch.ones(len(seen.actions), dtype=torch.float64))
    assert still.direction.abs().max() == 0


def test_it_learns_what_carries_over_to_networks_of_other_sizes():
    networks = [rows_of(n_groups, seed) for seed, n_groups in enumerate((4, 6, 9, 12))]
    policy, other = untrained(networks), rows_of(23, 99)
    before = value(policy, other)
    for number in range(4):
        worlds = [tried(policy, rows, 10 * number + at) for at, rows in enumerate(networks)]
        losses = improve(policy, worlds, PolicyGradientSettings(step=1.0, steps=60, lr=1e-2))
        assert len(losses) == 60 and losses[-1] < losses[0]
    assert all(value(policy, rows) > value(untrained(networks), rows) for rows in networks)
    assert value(policy, other) > before / 2  # rewards are below 0: at most half of what was lost is left


def test_nothing_to_learn_from_is_said():
    with pytest.raises(ValueError, match="expected at least one world"):
        improve(untrained([rows_of(2, 0)]), [], PolicyGradientSettings())
    with pytest.raises(UserError, match="steps"):
        PolicyGradientSettings(steps=0)
