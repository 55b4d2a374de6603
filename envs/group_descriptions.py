"""What an agent of any network sees of each filter group: one row of numbers, none of them tied to an architecture.

Shapes: L groups, R columns of a row, N filters of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .networks.cost import Cost
from .observation import STATISTIC_NAMES, Observation
from .repair.reconstruction_error import ErrorCurve
from .surgery.filter_group import FilterGroup
from .surgery.group_cost import pruned_cost
from .surgery.slicing import width

KEPT = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Fractions of a group's filters at which a row says what giving up the others costs."""
SPREADS = ("l2", "bn_scale", "mean_activation", "taylor", "consumer_l2")
MEANS = ("apoz", "redundancy")
PLACE = (
    "removed",
    "groups",
    "depth",
    "filters",
    "macs_share",
    "params_share",
    "positions",
    "kernel",
    "reader_kernel",
    "residual",
    "feeds_residual",
    "concatenated",
    "depthwise",
    "linear_reader",
)
"""What a group is and what it costs."""
DESCRIPTION_NAMES: tuple[str, ...] = (
    *PLACE,
    *(f"spread_{name}" for name in SPREADS),
    *(f"mean_{name}" for name in MEANS),
    "has_curve",
    "effective_rank",
    *(f"error_{kept:g}" for kept in KEPT),
    "planned",
    "planned_error",
    "planned_total",
)
GENERAL = (*PLACE, "planned", "planned_error")
"""The columns whose effect holds in families that were not trained on; spreads, ranks and single points of the curves
help only where they were seen (docs/decisions.md)."""
SMALLEST_ERROR = 1e-4  # of the loss, in nats: below it one group's error is as good as another's


def describe_groups(
    model: nn.Module,
    cost: Cost,
    groups: Sequence[FilterGroup],
    observations: Sequence[Observation],
    curves: Mapping[str, ErrorCurve],
    planned: Sequence[float],
    removed: float,
) -> NDArray[np.float32]:
    """Rows (L, R), columns `DESCRIPTION_NAMES`: where a group stands, what hangs on it, what giving it up costs.

    Shares are fractions, sizes logarithms, spreads standard deviation by mean; errors are logarithms of the expected
    loss per image (`error_curves`), so that all columns are of order 1 in any network.

    Args:
        model: the dense network.
        cost: its `count_cost`.
        groups: the groups that may be pruned, in execution order.
        observations: of each group.
        curves: what giving up filters costs, by group name; a group without one says so in `has_curve`.
        planned: fraction that a plan without search keeps of each group.
        removed: the fraction that the target removes.
    """
    producers = {cut.module: group for group in groups for cut in group.producers}
    rows = []
    for position, group in enumerate(groups):
        seen = dict(zip(STATISTIC_NAMES, observations[position].statistics.T.astype(np.float64), strict=True))
        curve = curves.get(group.name)
        own = {
            "removed": removed,
            "groups": math.log2(len(groups)) / 4,
            "depth": (position + 0.5) / len(groups),
            "filters": math.log2(group.n_filters) / 8,
            **_shares(model, cost, group),
            **_kind(model, cost, group, producers),
            **{f"spread_{name}": _spread(seen[name]) for name in SPREADS},
            **{f"mean_{name}": float(seen[name].mean()) for name in MEANS},
            "has_curve": float(curve is not None),
            "effective_rank": 0.0 if curve is None else curve.effective_rank,
            **{f"error_{kept:g}": _error(curve, kept) for kept in KEPT},
            "planned": math.log(planned[position]),
            "planned_error": _error(curve, planned[position]),
        }
        rows.append(own)
    errors = [_raw_error(curves.get(group.name), kept) for group, kept in zip(groups, planned, strict=True)]
    total = _scaled(sum(errors))
    table = [[row.get(name, total) for name in DESCRIPTION_NAMES] for row in rows]
    return np.asarray(table, dtype=np.float32)


def _shares(model: nn.Module, cost: Cost, group: FilterGroup) -> dict[str, float]:
    """Fractions of the network's MACs and parameters that go with all filters of a group."""
    macs, params = pruned_cost(model, cost, {group: 0})
    return {"macs_share": 1 - macs / max(cost.macs, 1), "params_share": 1 - params / max(cost.params, 1)}


def _kind(model: nn.Module, cost: Cost, group: FilterGroup, producers: Mapping[str, FilterGroup]) -> dict[str, float]:
    root, readers = group.producers[0].module, group.consumers
    modules = [model.get_submodule(cut.module) for cut in readers]
    weights = sum(parameter.numel() for parameter in model.get_submodule(root).parameters(recurse=False))
    positions = cost.modules[root].macs / max(weights, 1) if root in cost.modules else 1.0
    # What a reader makes is added to something if its own group has more makers than it, or cannot be pruned.
    into = [producers.get(cut.module) for cut in readers]
    passed = [model.get_submodule(cut.module) for cut in group.cuts if cut.kind == "pass"]
    return {
        "positions": math.log2(max(positions, 1.0)) / 10,
        "kernel": math.log2(_taps(model.get_submodule(root))) / 4,
        "reader_kernel": math.log2(max((_taps(module) for module in modules), default=1)) / 4,
        "residual": float(len(group.producers) > 1),
        "feeds_residual": float(any(each is None or len(each.producers) > 1 for each in into)),
        "concatenated": float(any(cut.channels.size < width(model.get_submodule(cut.module), "in") for cut in readers)),
        "depthwise": float(any(isinstance(module, _ConvNd) for module in passed)),
        "linear_reader": float(any(isinstance(module, nn.Linear) for module in modules)),
    }


def _taps(module: nn.Module) -> int:
    return math.prod(module.kernel_size) if isinstance(module, _ConvNd) else 1


def _spread(values: NDArray[np.float64]) -> float:
    scale = float(np.abs(values).mean())
    return float(values.std()) / scale if scale > 1e-12 else 0.0


def _raw_error(curve: ErrorCurve | None, kept: float) -> float:
    if curve is None:
        return 0.0
    gone = len(curve.errors) - max(1, round(kept * len(curve.errors)))
    return float(curve.errors[gone - 1]) if gone else 0.0


def _error(curve: ErrorCurve | None, kept: float) -> float:
    return 0.0 if curve is None else _scaled(_raw_error(curve, kept))


def _scaled(error: float) -> float:
    """The logarithm of an error of the loss, 0 at 0.018 and 1 at 1 nat."""
    return math.log(max(error, 0.0) + SMALLEST_ERROR) / 4 + 1
