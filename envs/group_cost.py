"""What a network costs once filters are gone, without building it: exact arithmetic on the counted dense network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .cost import Cost
    from .groups import FilterGroup


def pruned_cost(model: nn.Module, cost: Cost, kept: Mapping[FilterGroup, int]) -> tuple[int, int]:
    """MACs and parameters when each group keeps the given number of its filters.

    Which filters go does not matter, only how many. Equal to `count_cost` of the pruned network (a test compares).
    """
    shares: dict[str, dict[str, Fraction]] = defaultdict(lambda: {"out": Fraction(1), "in": Fraction(1)})
    for group, n_kept in kept.items():
        for cut in group.cuts:
            module = model.get_submodule(cut.module)
            gone = (group.n_filters - n_kept) * cut.channels.shape[1]
            shares[cut.module][cut.axis] -= Fraction(gone, _width(module, cut.axis))
    macs, params = cost.macs, cost.params
    for name, share in shares.items():
        module, both = model.get_submodule(name), share["out"] * share["in"]
        if name in cost.modules:
            dense = cost.modules[name].macs
            macs -= dense - int(dense * both)
        for parameter in module.parameters(recurse=False):
            part = share["out"] if parameter.dim() == 1 else both
            params -= parameter.numel() - int(parameter.numel() * part)
    return macs, params


def _width(module: nn.Module, axis: str) -> int:
    for attribute in (f"{axis}_channels", f"{axis}_features", "num_features", "num_channels", "num_parameters"):
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    raise TypeError(f"{type(module).__name__} has no width that can be pruned.")
