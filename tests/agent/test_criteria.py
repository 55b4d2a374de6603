"""Every criterion against a case computed by hand."""

import math

import pytest
import torch
from keepdrop.agent.criteria import CRITERIA, CriterionAgent, normalised, scores

NAMES = ("apoz", "taylor", "bn_scale", "mean_activation")
OBSERVATION = {
    "weights": torch.tensor([[3.0, -4.0], [0.0, 1.0], [0.0, 0.0]]),
    "statistics": torch.tensor([[0.5, 3.0, -2.0, 0.1], [0.9, 0.0, 1.0, 0.3], [0.1, 4.0, 0.5, 0.2]]),
}


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("l1", [7.0, 1.0, 0.0]),
        ("l2", [5.0, 1.0, 0.0]),
        # distances: 0-1 is |(3, -5)| = sqrt(34), 0-2 is 5, 1-2 is 1; each filter sums those to ALL others
        ("fpgm", [math.sqrt(34) + 5, math.sqrt(34) + 1, 6.0]),
        ("mean_activation", [0.1, 0.3, 0.2]),
        ("apoz", [-0.5, -0.9, -0.1]),
        ("taylor", [0.6, 0.0, 0.8]),
        ("bn_scale", [2.0, 1.0, 0.5]),
    ],
)
def test_by_hand(criterion: str, expected: list[float]) -> None:
    assert scores(OBSERVATION, NAMES, criterion).tolist() == pytest.approx(expected, rel=1e-6)


def test_statistics_are_found_by_name_not_place() -> None:
    order = [2, 0, 3, 1]
    shuffled = {**OBSERVATION, "statistics": OBSERVATION["statistics"][:, order]}
    names = tuple(NAMES[i] for i in order)
    for criterion in CRITERIA:
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        first, second = (
            scores(OBSERVATION, NAMES, criterion, generators[0]),
            scores(shuffled, names, criterion, generators[1]),
        )
        assert torch.equal(first, second)


def test_fpgm_drops_the_filter_the_others_can_replace() -> None:
    weights = torch.tensor([[10.0, 0.0], [10.0, 0.1], [10.0, -0.1], [-10.0, 0.0]])
    observation = {"weights": weights, "statistics": torch.zeros(4, 0)}
    assert CriterionAgent("fpgm").keep(observation, (), 3).tolist() == [False, True, True, True]
    assert scores(observation, (), "fpgm").argmin() == 0


def test_near_equal_filters_keep_their_small_distances() -> None:
    weights = torch.full((30, 50), 100.0)
    weights[1] += 1e-3
    distance = scores({"weights": weights, "statistics": torch.zeros(30, 0)}, (), "fpgm")
    exact = 29 * float(weights[1, 0].double() - 100.0) * math.sqrt(50)
    assert distance[1].item() == pytest.approx(exact, rel=1e-6)


def test_dead_layer_taylor_is_zero_not_nan() -> None:
    observation = {"weights": torch.zeros(2, 2), "statistics": torch.zeros(2, 4)}
    assert scores(observation, NAMES, "taylor").tolist() == [0.0, 0.0]


def test_normalised_by_hand() -> None:
    assert normalised(torch.tensor([3.0, 0.0, 4.0]), "l1").tolist() == pytest.approx([0.6, 0.0, 0.8])
    # minus APoZ -0.4, -1.0, -0.2 becomes the share of positive values 0.6, 0.0, 0.8, whose norm is 1
    assert normalised(torch.tensor([-0.4, -1.0, -0.2]), "apoz").tolist() == pytest.approx([0.6, 0.0, 0.8])
    assert normalised(torch.zeros(2), "l2").tolist() == [0.0, 0.0]
    for criterion in CRITERIA:
        found = scores(OBSERVATION, NAMES, criterion, torch.Generator().manual_seed(0))
        order = normalised(found, criterion).argsort()
        assert torch.equal(order, found.argsort()), criterion


def test_keep_takes_the_highest() -> None:
    assert CriterionAgent("apoz").keep(OBSERVATION, NAMES, 1).tolist() == [False, False, True]
    assert CriterionAgent("taylor").keep(OBSERVATION, NAMES, 2).tolist() == [True, False, True]


def test_random_repeats_with_its_seed_and_moves_on() -> None:
    wide = {"weights": torch.zeros(40, 2), "statistics": torch.zeros(40, 4)}
    first = CriterionAgent("random", torch.Generator().manual_seed(1))
    second = CriterionAgent("random", torch.Generator().manual_seed(1))
    masks = [first.keep(wide, NAMES, 20) for _ in range(2)]
    assert torch.equal(masks[0], second.keep(wide, NAMES, 20))
    assert not torch.equal(masks[0], masks[1])
    assert all(mask.sum() == 20 for mask in masks)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="criterion is 'l3', but it must be one of l1, l2, fpgm"):
        CriterionAgent("l3")
    with pytest.raises(ValueError, match="criterion is 'l3', but it must be one of"):
        scores(OBSERVATION, NAMES, "l3")
    with pytest.raises(ValueError, match="reads the statistic 'taylor', but there are only a, b, c, d"):
        scores(OBSERVATION, ("a", "b", "c", "d"), "taylor")
    with pytest.raises(ValueError, match="2 statistics are named, but the observation has 4 per filter"):
        scores(OBSERVATION, ("a", "taylor"), "taylor")
    with pytest.raises(ValueError, match="random criterion needs a generator"):
        scores(OBSERVATION, NAMES, "random")
    with pytest.raises(ValueError, match="n_keep is 4, but of 3 filters between 1 and 3"):
        CriterionAgent("l1").keep(OBSERVATION, NAMES, 4)
