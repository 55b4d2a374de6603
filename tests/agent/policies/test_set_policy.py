"""Policies: symmetry, independence of sizes, initial behaviour, clear refusals."""

from typing import Any

import pytest
import torch
from keepdrop.agent.policies.features import ranks, standardise
from keepdrop.agent.policies.layer_matrix import LayerMatrixPolicy
from keepdrop.agent.policies.set_policy import SetPolicy
from torch import Tensor

NAMES = ("l1", "taylor", "apoz", "position")


def observe(n_filters: int, n_weights: int = 27, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n_filters, n_weights, generator=generator)
    statistics = torch.randn(n_filters, 4, generator=generator)
    statistics[:, 3] = 0.7
    return {"weights": weights, "statistics": statistics}


def awake(policy: SetPolicy, seed: int = 3) -> SetPolicy:
    """Give the zero-initialised layers weights, so that every path is tested."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (policy.linear, policy.residual, policy.shift):
        torch.nn.init.normal_(layer.weight, generator=generator)
    return policy.double()


def double(observation: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() for key, value in observation.items()}


@pytest.mark.parametrize("exploration", ["budget", "bernoulli"])
def test_set_policy_is_permutation_equivariant(exploration: Any) -> None:
    policy = awake(SetPolicy(4, exploration=exploration))
    observation = double(observe(17))
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    shuffled = {key: value[order] for key, value in observation.items()}
    logits = policy(observation).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(policy(shuffled).logits, logits[order], rtol=1e-9, atol=1e-9)


def test_set_policy_treats_equal_filters_equally() -> None:
    observation = double(observe(6))
    twins = {key: value[[0, 1, 2, 3, 4, 5, 0]] for key, value in observation.items()}
    logits = awake(SetPolicy(4))(twins).logits
    assert logits[0].item() == pytest.approx(logits[6].item(), abs=1e-12)


def test_copying_every_filter_changes_no_score() -> None:
    policy = awake(SetPolicy(4))
    observation = double(observe(9))
    twice = {key: value.repeat(2, 1) for key, value in observation.items()}
    torch.testing.assert_close(policy(twice).logits, policy(observation).logits.repeat(2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n_filters", "n_weights"), [(1, 9), (2, 1), (512, 4608)])
def test_one_set_policy_takes_any_layer(n_filters: int, n_weights: int) -> None:
    policy = SetPolicy(4, warm_start="taylor", statistic_names=NAMES)
    distribution = policy(observe(n_filters, n_weights))
    assert distribution.greedy().shape == (n_filters,)
    assert torch.isfinite(distribution.entropy())


def test_rescaled_statistics_leave_the_ranking_features_alone() -> None:
    values = observe(20)["statistics"].double()
    torch.testing.assert_close(standardise(values * 50 + 3), standardise(values))
    assert torch.equal(ranks(values * 50 + 3), ranks(values))


def test_ranks_by_hand() -> None:
    assert ranks(torch.tensor([[3.0], [1.0], [3.0], [7.0]])).flatten().tolist() == pytest.approx(
        [0.0, -0.75, 0.0, 0.75]
    )


def test_constant_columns_say_nothing() -> None:
    constant = torch.full((5, 1), 0.1) + torch.tensor([[0.0], [1e-9], [0.0], [0.0], [0.0]])
    assert standardise(constant).abs().max() == 0.0
    assert ranks(torch.full((5, 1), 0.1)).abs().max() == 0.0


@pytest.mark.parametrize("warm_start", [None, "taylor"])
@pytest.mark.parametrize("keep", [0.3, 0.7, 0.9])
def test_initial_keep_is_what_was_asked_for(warm_start: str | None, keep: float) -> None:
    policy = SetPolicy(4, exploration="bernoulli", initial_keep=keep, warm_start=warm_start, statistic_names=NAMES)
    assert policy(observe(64)).keep_probability().mean().item() == pytest.approx(keep, abs=0.02)


def test_initial_scale_spreads_the_kept_fraction(generator: torch.Generator) -> None:
    policy = SetPolicy(4, initial_keep=0.6, initial_scale=0.2, warm_start="taylor", statistic_names=NAMES)
    kept = policy(observe(256)).sample(400, generator).masks.float().mean(1)
    assert kept.std().item() == pytest.approx(0.2, abs=0.04)


def test_warm_start_ranks_by_the_named_statistic() -> None:
    observation = observe(30)
    logits = SetPolicy(4, warm_start="taylor", statistic_names=NAMES)(observation).logits
    assert torch.equal(logits.argsort(), observation["statistics"][:, 1].argsort())


def test_without_warm_start_all_filters_begin_equal() -> None:
    assert SetPolicy(4)(observe(30)).logits.std() < 1e-6


@pytest.mark.parametrize(
    "make", [lambda seed: SetPolicy(4, seed=seed), lambda seed: LayerMatrixPolicy(6, 9, seed=seed)]
)
def test_initial_weights_come_from_the_seed_alone(make: Any) -> None:
    torch.manual_seed(0)
    first = make(7).state_dict()
    after = torch.random.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(after, torch.random.get_rng_state())
    torch.manual_seed(99)
    second = make(7).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"warm_start": "tailor", "statistic_names": NAMES},
            "warm_start is 'tailor'; expected one of the statistics: l1, taylor",
        ),
        ({"warm_start": "taylor"}, "none, give statistic_names"),
        ({"statistic_names": ("l1",)}, "names 1 statistics, but n_statistics is 4"),
        ({"initial_keep": 1.0}, "initial_keep is 1.0; expected the fraction to keep at first"),
        ({"initial_scale": 0.0}, "initial_scale is 0.0; expected a spread above 0"),
        ({"exploration": "topk"}, "exploration is 'topk'; expected one of budget, bernoulli"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SetPolicy(4, **arguments)


def test_another_observation_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reads 5 statistics per filter, but the observation has 4; use an agent"):
        SetPolicy(5)(observe(8))
    with pytest.raises(ValueError, match=r"reads 8 filters of 27 weights, but the observation has 9 of 27"):
        LayerMatrixPolicy(8, 27)(observe(9))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weights": None}, "the observation lacks weights"),
        ({"weights": torch.zeros(7, 27)}, r"of the same filters were expected, but came as \(7, 27\) and \(8, 4\)"),
        ({"statistics": torch.full((8, 4), float("nan"))}, "observed statistics are not all finite"),
    ],
)
def test_broken_observations_are_refused(change: dict[str, Any], text: str) -> None:
    observation: dict[str, Any] = {**observe(8), **change}
    observation = {key: value for key, value in observation.items() if value is not None}
    with pytest.raises(ValueError, match=text):
        SetPolicy(4)(observation)


@pytest.mark.parametrize(("n_filters", "n_weights"), [(3, 9), (16, 144), (64, 576), (200, 600), (512, 4608)])
@pytest.mark.parametrize("exploration", ["budget", "bernoulli"])
def test_layer_matrix_policy_fits_every_shape(n_filters: int, n_weights: int, exploration: Any) -> None:
    policy = LayerMatrixPolicy(n_filters, n_weights, exploration=exploration, initial_keep=0.8)
    distribution = policy(observe(n_filters, n_weights))
    assert distribution.logits.shape == (n_filters,)
    centre = torch.sigmoid(distribution.logits)
    torch.testing.assert_close(centre, torch.full((n_filters,), 0.8), atol=0.02, rtol=0)


def test_layer_matrix_policy_convolves_only_large_d() -> None:
    def convolutions(policy: LayerMatrixPolicy) -> list[Any]:
        return [m.kernel_size for m in policy.modules() if isinstance(m, torch.nn.Conv2d)]

    assert convolutions(LayerMatrixPolicy(16, 27)) == []
    assert convolutions(LayerMatrixPolicy(16, 144)) == [(7, 7), (7, 7)]


@pytest.mark.parametrize(
    "make", [lambda: SetPolicy(4), lambda: LayerMatrixPolicy(16, 144), lambda: LayerMatrixPolicy(4, 9)]
)
def test_every_parameter_is_in_exactly_one_group(make: Any) -> None:
    policy = make()
    grouped = [id(p) for group in policy.parameter_groups() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in policy.parameters())
