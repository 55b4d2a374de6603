"""Each reward against values computed by hand, and its promises."""

import math
from typing import Any

import pytest
from keepdrop.rewards import Budget, Outcome, Priced, TryAndLearn, UserError


def outcome(drop: float = 0.0, kept: int = 8, removed: float = 0.5, **more: Any) -> Outcome:
    """16 filters, base accuracy 0.8; `removed` is the fraction of MACs, a tenth of it of the parameters."""
    facts: dict[str, Any] = {
        "base_accuracy": 0.8,
        "pruned_accuracy": 0.8 - drop,
        "n_filters": 16,
        "n_kept": kept,
        "base_macs": 1000,
        "pruned_macs": round(1000 * (1 - removed)),
        "base_params": 1000,
        "pruned_params": round(1000 * (1 - removed / 10)),
    }
    return Outcome(**(facts | more))


def test_try_and_learn_by_hand() -> None:
    reward = TryAndLearn(0.02)(outcome(drop=0.01, kept=4))
    assert reward.terms["psi"] == pytest.approx(0.5)
    assert reward.terms["phi"] == pytest.approx(1.3862943611198906)
    assert reward.value == pytest.approx(0.6931471805599453)


def test_try_and_learn_of_the_paper_is_unbounded_below() -> None:
    # psi = (0.02 - 0.3) / 0.02 = -14, phi = ln 2
    assert TryAndLearn(0.02, floor=None)(outcome(drop=0.3, kept=8)).value == pytest.approx(-14 * math.log(2))


def test_try_and_learn_bounds_negative_rewards() -> None:
    raw = -14 * math.log(2)
    reward = TryAndLearn(0.02, floor=-1.0)(outcome(drop=0.3, kept=8))
    assert reward.value == pytest.approx(raw / (1 - raw))
    assert reward.terms["psi"] == pytest.approx(-14.0)


def test_the_bound_keeps_the_order_and_the_floor() -> None:
    values = [TryAndLearn(0.005, floor=-2.0)(outcome(drop=d / 100, kept=1)).value for d in range(80)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)
    assert min(values) > -2.0


@pytest.mark.parametrize("drop", [-0.1, 0.0, 0.3])
def test_keep_all_scores_exactly_zero(drop: float) -> None:
    value = TryAndLearn(0.02)(outcome(drop=drop, kept=16)).value
    assert value == 0.0
    assert math.copysign(1.0, value) == 1.0


def test_sign_changes_at_the_bound() -> None:
    reward = TryAndLearn(0.02)
    assert reward(outcome(drop=0.019)).value > 0 > reward(outcome(drop=0.021)).value


def test_an_empty_mask_is_refused_before_the_log() -> None:
    with pytest.raises(ValueError, match="not defined for a mask that keeps no filter"):
        TryAndLearn(0.02)(outcome(kept=0))


@pytest.mark.parametrize(
    ("bound", "text"),
    [
        (1.0, "if you mean 1 percent, give 0.01"),
        (2, "if you mean 2 percent, give 0.02"),
        (0.5, "if you mean 0.5 percent, give 0.005"),
        (0.0, r"give a number in \(0, 0.5\)"),
        (-0.02, r"drop_bound is -0.02"),
        (math.nan, "drop_bound is nan"),
    ],
)
def test_wrong_bounds(bound: float, text: str) -> None:
    with pytest.raises(UserError, match=text):
        TryAndLearn(bound)


@pytest.mark.parametrize("floor", [0.0, 1.0, -math.inf, math.nan])
def test_wrong_floor(floor: float) -> None:
    with pytest.raises(UserError, match="give a number below 0, or None"):
        TryAndLearn(0.02, floor=floor)


def test_budget_by_hand() -> None:
    # 0.72 / 0.8 = 0.9 kept; 0.5 - 0.3 = 0.2 missing of 0.5: shortfall 0.4
    reward = Budget(0.5, weight=2.0)(outcome(drop=0.08, removed=0.3))
    assert reward.value == pytest.approx(0.9 - 2.0 * 0.4)
    assert reward.terms == pytest.approx({"accuracy_kept": 0.9, "removed": 0.3, "shortfall": 0.4, "excess": 0.0})


def test_budget_with_a_bound_by_hand() -> None:
    # drop 0.08 is 0.04 over the bound: excess 0.04 / 0.8 = 0.05
    reward = Budget(0.5, drop_bound=0.04, weight=2.0)(outcome(drop=0.08, removed=0.5))
    assert reward.value == pytest.approx(0.9 - 2.0 * 0.05)


def test_budget_overshooting_gains_nothing() -> None:
    budget = Budget(0.5)
    assert budget(outcome(drop=0.1, removed=0.9)).value == budget(outcome(drop=0.1, removed=0.5)).value


def test_budget_prefers_any_mask_on_target_to_keep_all() -> None:
    budget = Budget(0.5)
    assert budget(outcome(drop=0.8, removed=0.5)).value > budget(outcome(drop=0.0, removed=0.0)).value


def test_budget_rises_towards_the_target() -> None:
    values = [Budget(0.5)(outcome(drop=0.2 * r, removed=r)).value for r in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)]
    assert values == sorted(values)


def test_budget_reads_the_named_resource() -> None:
    facts = outcome(removed=0.5, kept=4, base_seconds=1.0, pruned_seconds=1.2)
    removed = {name: Budget(0.5, resource=name)(facts).terms["removed"] for name in ("macs", "params", "filters")}  # type: ignore[arg-type]
    assert removed == pytest.approx({"macs": 0.5, "params": 0.05, "filters": 0.75})
    assert Budget(0.5, resource="seconds")(facts).terms["removed"] == pytest.approx(-0.2)


def test_budget_in_seconds_needs_a_measurement() -> None:
    with pytest.raises(UserError, match="no measured latency"):
        Budget(0.5, resource="seconds")(outcome())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"target": 50}, "if you mean 50 percent, give 0.5"),
        ({"target": 0.0}, r"give a number in \(0, 1\)"),
        ({"target": 0.5, "resource": "flops"}, "resource is 'flops', but it must be one of macs, params"),
        ({"target": 0.5, "weight": 1.0}, "weight above 1"),
        ({"target": 0.5, "drop_bound": 2.0}, "if you mean 2 percent"),
    ],
)
def test_wrong_budgets(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Budget(**arguments)


def test_priced_by_hand() -> None:
    reward = Priced(0.1)(outcome(drop=0.02, removed=0.5))
    assert reward.value == pytest.approx(0.1 * 0.5 - 0.02)
    assert reward.terms == pytest.approx({"drop": 0.02, "removed": 0.5})
    assert Priced(0.1)(outcome(drop=0.0, removed=0.0)).value == 0.0


@pytest.mark.parametrize("price", [0.0, -1.0, math.nan, math.inf])
def test_wrong_price(price: float) -> None:
    with pytest.raises(UserError, match="give one above 0"):
        Priced(price)
