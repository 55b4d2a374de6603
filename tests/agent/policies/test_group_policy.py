"""GroupPolicy: equivariant over groups and filters, any number of both, untrained the plan itself, safe on disk."""

import pytest
import torch
from keepdrop.agent.policies.group_policy import GroupPolicy
from keepdrop.agent.saved_agent import AgentMismatch, load_agent, save_agent
from keepdrop.errors import UserError

NAMES, STATISTICS = ("depth", "planned", "share"), ("l1", "l2")


def policy(trained=True):
    torch.manual_seed(1)
    made = GroupPolicy(NAMES, STATISTICS, hidden=8)
    if trained:
        with torch.no_grad():
            for value in made.parameters():
                value.normal_(0, 0.5)
    return made


def network(sizes=(3, 5, 4), seed=0):
    """An observation of groups of these sizes."""
    draw = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    return {
        "weights": torch.randn(n, 9, generator=draw),
        "statistics": torch.rand(n, len(STATISTICS), generator=draw),
        "groups": torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).float(),
        "descriptions": torch.randn(len(sizes), len(NAMES), generator=draw),
        "places": torch.rand(n, generator=draw) * 2 - 1,
    }


def test_shuffled_groups_get_shuffled_answers():
    seen, asked = network(), policy()
    owner, order = seen["groups"].long(), torch.tensor([2, 0, 1])
    filters = torch.cat([(owner == group).nonzero()[:, 0] for group in order])
    shuffled = {key: value[filters] for key, value in seen.items() if key != "descriptions"}
    shuffled["descriptions"] = seen["descriptions"][order]
    shuffled["groups"] = torch.argsort(order)[owner[filters]].float()
    assert torch.allclose(asked.log_weights(shuffled["descriptions"]), asked.log_weights(seen["descriptions"])[order])
    assert torch.allclose(asked.scores(shuffled), asked.scores(seen)[filters])
    assert asked.log_weights(seen["descriptions"]).std() > 0.01


def test_shuffled_filters_get_shuffled_scores():
    seen, asked = network(), policy()
    filters = torch.tensor([2, 0, 1, 7, 5, 6, 4, 3, 9, 10, 11, 8])
    shuffled = {key: value if key == "descriptions" else value[filters] for key, value in seen.items()}
    assert torch.allclose(asked.scores(shuffled), asked.scores(seen)[filters])


@pytest.mark.parametrize("sizes", [(1,), (2, 7), (4,) * 30])
def test_any_number_of_groups_and_filters(sizes):
    seen = network(sizes)
    scores = policy().scores(seen)
    assert scores.shape == (sum(sizes),) and bool(scores.isfinite().all()) and scores.dtype == torch.float64


def test_the_mean_over_groups_is_read():
    """The same row beside other ones gets another weight: a group is judged within its network."""
    rows, asked = network()["descriptions"], policy()
    other = torch.cat([rows[:2], rows[2:] + 3])
    here, there = (asked.log_weights(each).detach() for each in (rows, other))
    assert abs(float((here[0] - here[1]) - (there[0] - there[1]))) > 1e-3


def test_untrained_it_is_the_plan():
    """Weights are what was planned, and the order inside a group is that of the plan's places."""
    seen, asked = network(), policy(trained=False)
    asked.normalise([seen["descriptions"]])
    with torch.no_grad():
        assert torch.allclose(asked.log_weights(seen["descriptions"]).float(), seen["descriptions"][:, 1])
        scores, owner = asked.scores(seen), seen["groups"].long()
    for group in range(3):
        mine = owner == group
        assert torch.equal(scores[mine].argsort(), seen["places"][mine].argsort())
        best = -0.5 / int(mine.sum()) / torch.exp(seen["descriptions"][group, 1].double())
        assert float(scores[mine].max()) == pytest.approx(float(best))


def test_a_constant_column_is_not_blown_up():
    rows = torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, 5.0]])
    asked = policy(trained=False)
    asked.normalise([rows])
    assert asked.centre.tolist() == [2, 3, 5] and asked.spread.tolist() == [1, 1, 1]


def test_saved_and_loaded_it_is_the_same_bit_for_bit(tmp_path):
    asked, seen = policy(), network()
    asked.normalise([seen["descriptions"]])
    save_agent(tmp_path, asked, {"group": "any network"})
    loaded = load_agent(tmp_path).policy
    assert isinstance(loaded, GroupPolicy) and loaded.kwargs == asked.kwargs
    assert all(
        torch.equal(a, b) for a, b in zip(asked.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert torch.equal(asked.scores(seen), loaded.scores(seen))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e12])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    asked = policy()
    with torch.no_grad():
        asked.read[0].weight[0, 0] = value
    save_agent(tmp_path, asked, {})
    with pytest.raises(AgentMismatch, match=r"NaN, infinite or absurdly large weights in read\.0\.weight"):
        load_agent(tmp_path)


def test_a_size_that_asks_for_memory_is_refused_before_it_gets_any(tmp_path):
    asked = policy()
    asked.kwargs = {**asked.kwargs, "hidden": 10**6}
    save_agent(tmp_path, asked, {})
    with pytest.raises(AgentMismatch, match="do not fit its policy"):
        load_agent(tmp_path)


def test_rows_of_another_kind_are_refused():
    seen = network()
    with pytest.raises(ValueError, match="reads rows of 3 columns and 2 statistics"):
        policy().features({**seen, "descriptions": seen["descriptions"][:, :2]})
    with pytest.raises(ValueError, match="2 rows for 3 groups"):
        policy().features({**seen, "descriptions": seen["descriptions"][:2]})
    with pytest.raises(UserError, match="have no column 'planned', only depth"):
        GroupPolicy(["depth"], STATISTICS)
