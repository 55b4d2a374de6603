"""Training on toys with a known answer, and what is remembered of it."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from keepdrop.agent.learning.best_masks import BestMasks
from keepdrop.agent.learning.rollout import collect_rollout, evaluate_masks
from keepdrop.agent.learning.trainer import AgentSettings, Trainer, threshold_masks, train_agent
from keepdrop.agent.policies.layer_matrix import LayerMatrixPolicy
from keepdrop.agent.policies.set_policy import SetPolicy
from keepdrop.errors import UserError

# Slower than the default, which trades certainty for 40 updates: with these, 10 of 10 seeds are solved.
PATIENT = AgentSettings(updates=100, lr=0.03, patience=None, sweep=False)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("exploration", ["budget", "bernoulli"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_set_policy_finds_the_useless_filters(make_useless: Any, exploration: Any, seed: int) -> None:
    env, useful = make_useless(n_filters=16, seed=seed)
    policy = SetPolicy(6, exploration=exploration, initial_keep=0.7, seed=seed)
    result = train_agent(env, policy, PATIENT, seeded(seed))
    assert result.greedy.tolist() == useful.tolist()


@pytest.mark.parametrize("n_weights", [18, 144])
def test_layer_matrix_policy_finds_the_useless_filters(make_useless: Any, n_weights: int) -> None:
    env, useful = make_useless(n_filters=10, n_weights=n_weights)
    policy = LayerMatrixPolicy(10, n_weights, initial_keep=0.7)
    result = train_agent(env, policy, dataclasses.replace(PATIENT, lr=0.1), seeded())
    assert result.greedy.tolist() == useful.tolist()


def test_ranked_advantages_learn_too(make_useless: Any) -> None:
    env, useful = make_useless(n_filters=16)
    settings = dataclasses.replace(PATIENT, baseline="rank")
    assert train_agent(env, SetPolicy(6, initial_keep=0.7), settings, seeded()).greedy.tolist() == useful.tolist()


def test_a_reward_that_says_nothing_teaches_nothing(make_env: Any) -> None:
    """The control: on noise, the solved toys' answer does not appear by itself."""
    rng = np.random.default_rng(0)
    weights, statistics = rng.normal(size=(16, 18)), rng.normal(size=(16, 6))
    env = make_env(weights, statistics, lambda masks: np.zeros(len(masks)))
    result = train_agent(env, SetPolicy(6), AgentSettings(updates=20, entropy_weight=0.0, sweep=False), seeded())
    assert result.greedy.all()


def test_patience_stops_and_says_so(make_useless: Any) -> None:
    env, _ = make_useless()
    result = train_agent(env, SetPolicy(6), AgentSettings(updates=400, patience=10), seeded())
    assert result.converged
    assert result.n_updates == len(result.history) < 400
    unhurried = train_agent(env, SetPolicy(6), AgentSettings(updates=3, patience=10), seeded())
    assert not unhurried.converged
    assert unhurried.n_updates == 3


def test_best_masks_are_distinct_sorted_and_scored_as_said(make_useless: Any) -> None:
    env, _ = make_useless()
    result = train_agent(env, SetPolicy(6), AgentSettings(updates=10, top_k=5), seeded())
    rewards = [scored.reward for scored in result.best]
    assert rewards == sorted(rewards, reverse=True)
    assert len({tuple(scored.mask.tolist()) for scored in result.best}) == 5
    again, _ = evaluate_masks(env, torch.stack([scored.mask for scored in result.best]))
    assert again.tolist() == rewards
    assert rewards[0] >= max(step["reward_max"] for step in result.history)


def test_the_sweep_scores_the_greedy_mask_and_costs_one_step(make_useless: Any) -> None:
    env, _ = make_useless()
    result = train_agent(env, SetPolicy(6), AgentSettings(updates=4), seeded())
    assert env.n_steps == 5
    assert result.greedy_reward == evaluate_masks(env, result.greedy[None])[0].item()
    assert result.best[0].reward >= result.greedy_reward
    assert train_agent(env, SetPolicy(6), AgentSettings(updates=4, sweep=False), seeded()).greedy_reward is None


def test_threshold_masks_are_nested_distinct_and_start_greedy() -> None:
    logits = torch.randn(100, generator=seeded())
    masks = threshold_masks(logits, logits > 0, 16)
    counts = masks.sum(1).tolist()
    assert torch.equal(masks[0], logits > 0)
    assert len(masks) == len(set(counts)) == 16
    ordered = masks[masks.sum(1).argsort()]
    assert (ordered[:-1] <= ordered[1:]).all()
    assert threshold_masks(torch.zeros(1), torch.tensor([True]), 16).tolist() == [[True]]


def test_the_same_seed_gives_the_same_bits_whatever_the_global_state(make_useless: Any) -> None:
    env, _ = make_useless()
    states = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        policy = SetPolicy(6, seed=4)
        train_agent(env, policy, AgentSettings(updates=5), seeded())
        states.append(policy.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_callback_sees_every_update(make_useless: Any) -> None:
    env, _ = make_useless()
    seen: list[tuple[int, float]] = []

    def callback(trainer: Trainer, metrics: Any) -> None:
        seen.append((len(trainer.history), metrics["info/kept"]))

    result = train_agent(env, SetPolicy(6), AgentSettings(updates=4), seeded(), callback=callback)
    assert seen == [(i + 1, step["info/kept"]) for i, step in enumerate(result.history)]
    assert "info/name" not in result.history[0]


def test_a_rollout_records_what_the_environment_said(make_useless: Any) -> None:
    env, useful = make_useless()
    rollout = collect_rollout(env, SetPolicy(6), seeded())
    assert rollout.rewards.dtype == torch.float64
    np.testing.assert_array_equal(rollout.rewards.numpy(), env.score(rollout.sample.masks.numpy()))
    assert set(rollout.infos) == {"kept"}
    assert rollout.observation["weights"].shape == (len(useful), 18)


def test_any_number_of_masks_is_scored_in_order(make_useless: Any) -> None:
    env, useful = make_useless(n_masks=4)
    masks = torch.rand(10, len(useful), generator=seeded()) < 0.5
    rewards, infos = evaluate_masks(env, masks)
    np.testing.assert_allclose(rewards.numpy(), env.score(masks.numpy()))
    np.testing.assert_allclose(infos["kept"].numpy(), masks.double().mean(1).numpy())
    assert env.n_steps == 3


def test_environments_that_break_the_contract_are_refused(make_env: Any) -> None:
    weights, statistics = np.zeros((4, 9)), np.zeros((4, 6))
    bad = make_env(weights, statistics, lambda masks: np.full(len(masks), np.nan))
    with pytest.raises(ValueError, match="rewards must be finite"):
        collect_rollout(bad, SetPolicy(6), seeded())

    class Endless(make_env):  # type: ignore[misc]
        def step(self, actions: np.ndarray) -> Any:
            observation, rewards, ended, _, infos = super().step(actions)
            return observation, rewards, np.zeros_like(ended), np.zeros_like(ended), infos

    endless = Endless(weights, statistics, lambda masks: np.zeros(len(masks)))
    with pytest.raises(ValueError, match="one step must be one episode"):
        collect_rollout(endless, SetPolicy(6), seeded())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"updates": -1}, "updates is -1"),
        ({"lr": 0.0}, "lr is 0.0, but a learning rate must be above 0"),
        ({"top_k": 0}, "top_k is 0, but at least 1 mask must be remembered"),
        ({"baseline": "zscore"}, "baseline is 'zscore', but it must be one of none, leave_one_out, rank"),
        ({"patience": 0}, "patience is 0, but it must be at least 1, or None"),
        ({"smoothing": 1.0}, r"smoothing is 1.0, but it must lie in \[0, 1\)"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        AgentSettings(**arguments)


def test_no_updates_is_a_decision_of_the_untrained_policy(make_useless: Any) -> None:
    env, _ = make_useless()
    result = train_agent(env, SetPolicy(6), AgentSettings(updates=0, sweep=False), seeded())
    assert result.n_updates == 0
    assert result.greedy.all()
    assert result.best == []


def test_equal_rewards_keep_the_order_of_discovery() -> None:
    best = BestMasks(2)
    masks = torch.tensor([[True, False], [False, True], [True, True], [True, False]])
    best.add(masks, torch.tensor([1.0, 1.0, 1.0, 5.0]))
    assert [scored.mask.tolist() for scored in best.masks] == [[True, False], [False, True]]
    assert [scored.reward for scored in best.masks] == [1.0, 1.0]
