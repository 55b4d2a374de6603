"""Rows of groups by hand, finite on every kind of network, and the task that shows them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from answered import NETWORKS, answered
from digits_task import make_task
from gymnasium.utils.env_checker import check_env
from keepdrop.agent.policies.group_policy import GroupPolicy
from keepdrop.agent.saved_agent import SavedAgent
from keepdrop.envs import described_task
from keepdrop.envs.described_task import DescribedTask, even_scores
from keepdrop.envs.filter_pruning import FilterPruningEnv, FilterPruningVectorEnv
from keepdrop.envs.group_descriptions import DESCRIPTION_NAMES, GENERAL, KEPT, describe_groups
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.observation import STATISTIC_NAMES, Observation
from keepdrop.envs.repair.reconstruction_error import RECONSTRUCTION, ErrorCurve
from keepdrop.envs.surgery.targets import Target
from keepdrop.errors import UserError
from keepdrop.experiments.pruning.pretrained import pretrained_choices
from keepdrop.rewards.priced import Priced
from torch import nn
from torch.nn import functional as F
from zoo import ZOO


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.second = nn.Conv2d(4, 6, 1, bias=False)
        self.linear = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.linear(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


def seen_of(groups, draw):
    return [
        Observation(
            torch.rand(group.n_filters, 9, generator=draw).numpy(),
            torch.rand(group.n_filters, len(STATISTIC_NAMES), generator=draw).numpy(),
        )
        for group in groups
    ]


def rows_of(model, shape, curves=None, planned=0.5, removed=0.3):
    groups = find_groups(model.eval(), torch.zeros(1, *shape)).groups
    draw = torch.Generator().manual_seed(0)
    seen = seen_of(groups, draw)
    cost = count_cost(model, torch.zeros(1, *shape))
    table = describe_groups(model, cost, groups, seen, curves or {}, [planned] * len(groups), removed)
    names = {
        group.name: dict(zip(DESCRIPTION_NAMES, row, strict=True)) for group, row in zip(groups, table, strict=True)
    }
    return names, dict(zip((group.name for group in groups), seen, strict=True)), table


def test_a_row_by_hand():
    errors = torch.tensor([0.0, 0.01, 0.1, 1.0], dtype=torch.float64)
    curves = {"first": ErrorCurve(torch.arange(4), errors, 0.25)}
    rows, seen, table = rows_of(Plain(), (1, 8, 8), curves)
    assert table.dtype == np.float32 and table.shape == (2, len(DESCRIPTION_NAMES))
    first, second = rows["first"], rows["second"]
    # MACs: 4 x 9 x 64, 6 x 4 x 64, 4 x 6; parameters: 36, 24, 24.
    assert first["macs_share"] == pytest.approx((2304 + 1536) / 3864) and first["params_share"] == pytest.approx(
        60 / 84
    )
    assert second["macs_share"] == pytest.approx(1560 / 3864) and second["params_share"] == pytest.approx(48 / 84)
    assert [first[name] for name in ("removed", "groups", "depth", "filters")] == pytest.approx([0.3, 0.25, 0.25, 0.25])
    assert first["positions"] == pytest.approx(0.6) and second["depth"] == pytest.approx(0.75)
    assert first["kernel"] == pytest.approx(math.log2(9) / 4) and first["reader_kernel"] == second["kernel"] == 0
    kinds = ("residual", "feeds_residual", "concatenated", "depthwise", "linear_reader")
    assert [first[name] for name in kinds] == [0, 0, 0, 0, 0] and second["linear_reader"] == 1
    values = seen["first"].statistics[:, STATISTIC_NAMES.index("l2")].astype(float)
    assert first["spread_l2"] == pytest.approx(values.std() / values.mean(), rel=1e-5)
    scaled = {error: math.log(error + 1e-4) / 4 + 1 for error in (0.0, 0.01, 0.1, 1.0)}
    # Of 4 filters 0.875 x 4 = 3.5 rounds to 4, 0.5 to 2: one given up costs nothing, two 0.01, three 0.1.
    kept = {0.875: 0.0, 0.75: 0.0, 0.625: 0.01, 0.5: 0.01, 0.375: 0.01, 0.25: 0.1, 0.125: 0.1}
    assert set(kept) == set(KEPT)
    found = {fraction: first[f"error_{fraction:g}"] for fraction in KEPT}
    assert found == pytest.approx({fraction: scaled[error] for fraction, error in kept.items()}, rel=1e-5)
    assert first["planned"] == pytest.approx(math.log(0.5)) and first["planned_error"] == pytest.approx(scaled[0.01])
    assert first["planned_total"] == second["planned_total"] == pytest.approx(scaled[0.01], rel=1e-5)
    assert (first["has_curve"], second["has_curve"]) == (1, 0) and first["effective_rank"] == 0.25
    assert second["error_0.5"] == 0


def test_kinds_of_groups():
    residual, _, _ = rows_of(ZOO["ResidualStream"](), (3, 8, 8))
    assert residual["stem"]["residual"] == 1 and residual["inner1"]["residual"] == 0
    assert residual["inner1"]["feeds_residual"] == 1
    beside, _, _ = rows_of(ZOO["Concat"](), (3, 8, 8))
    assert beside["left"]["concatenated"] == beside["right"]["concatenated"] == 1
    deep, _, _ = rows_of(ZOO["Depthwise"](), (3, 8, 8))
    assert max(row["depthwise"] for row in deep.values()) == 1


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_rows_are_finite_and_of_order_one_on_every_network(name):
    make, shape = NETWORKS[name]
    model, *_ = answered(make, shape, count=2)
    _, _, table = rows_of(model, shape)
    assert np.isfinite(table).all() and np.abs(table).max() < 5
    shares = table[:, [DESCRIPTION_NAMES.index("macs_share"), DESCRIPTION_NAMES.index("params_share")]]
    assert (shares > 0).all() and (shares <= 1).all()


@pytest.fixture(scope="module")
def described():
    return DescribedTask(make_task(), Target(0.5, "network"), None)


def test_the_environment_shows_the_rows(described):
    env = FilterPruningVectorEnv(described, Priced(0.1), 3, 40)
    shapes = {key: space.shape for key, space in env.single_observation_space.items()}
    assert shapes["descriptions"] == (len(described.groups), len(DESCRIPTION_NAMES))
    assert shapes["places"] == (described.n_filters,) and {"weights", "statistics", "groups"} < set(shapes)
    observation, _ = env.reset(seed=0)
    assert np.array_equal(observation["descriptions"][2], described.observation.descriptions)


@pytest.mark.filterwarnings("ignore:.*A Box observation space m..imum value is -?infinity:UserWarning")
def test_gymnasium_agrees_with_the_environment(described):
    check_env(FilterPruningEnv(described, Priced(0.1)), skip_render_check=True)


def test_places_are_those_of_the_plan(described):
    """A filter that the plan keeps longer has a higher place; what is planned is what the plan keeps."""
    seen = described.observation
    planned = np.exp(seen.descriptions[:, DESCRIPTION_NAMES.index("planned")])
    for place, group in enumerate(described.groups):
        ours, scores = seen.places[seen.groups == place], described.ranking[group.name].numpy()
        assert np.array_equal(np.argsort(ours, kind="stable"), np.argsort(scores, kind="stable"))
        assert np.abs(ours).max() < 1 and planned[place] == pytest.approx(described.plan[group.name].double().mean())


def test_without_curves_the_plan_is_even():
    task = DescribedTask(make_task(), Target(0.5, "network"), None, curves={})
    kept = [float(keep.double().mean()) for keep in task.plan.values()]
    assert max(kept) - min(kept) < 0.15
    assert not task.observation.descriptions[:, DESCRIPTION_NAMES.index("has_curve")].any()
    statistics = np.zeros((3, len(STATISTIC_NAMES)))
    statistics[:, STATISTIC_NAMES.index("l2")] = [2, 9, 5]
    assert even_scores({"a": statistics})["a"].argsort().tolist() == [0, 2, 1]


def test_a_plan_that_is_not_reconstruction_is_not_called_so(described, monkeypatch):
    """Where the criterion cannot read the network, or cannot repair it between two rounds, the plan is equal shares."""
    assert described.reconstruction_ranking is described.ranking
    unread = DescribedTask(described.task, described.target, None, described.layers, curves={})
    monkeypatch.setattr(described_task, "reconstruction_scores", refusing)
    unrepaired = DescribedTask(described.task, described.target, None, described.layers, described.curves)
    policy = GroupPolicy(DESCRIPTION_NAMES, STATISTIC_NAMES, read=GENERAL)
    for task in (unread, unrepaired):
        assert task.reconstruction_ranking is None
        assert all(torch.equal(task.ranking[name], scores) for name, scores in task.even.items())
        choices = pretrained_choices(SavedAgent(policy, {}, Path()), task)
        assert RECONSTRUCTION not in choices and "uniform l2" in choices


def refusing(*arguments, **named):
    raise UserError("The network cannot be traced.")
