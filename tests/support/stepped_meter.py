"""Times that rise in steps, as on devices that work in blocks of channels: as a meter and as a profile."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.surgery.filter_group import FilterGroup
from keepdrop.envs.surgery.latency_profile import LatencyProfile, Sample, TimeTable
from keepdrop.experiments.deploy.profiling import conditions_of, design, layer_shapes


@dataclass(frozen=True)
class SteppedMeter:
    """`overhead` seconds, and `per_step` more for every `step` filters that a group keeps, begun ones included."""

    groups: Sequence[FilterGroup]
    step: int = 8
    per_step: float = 1e-3
    overhead: float = 1e-3

    @property
    def whole(self) -> float:
        return self.cost([group.n_filters for group in self.groups])

    def cost(self, kept: Sequence[int]) -> float:
        return self.overhead + self.per_step * sum(ceil(n / self.step) for n in kept)


def clock(step: int = 8, per_step: float = 1e-3):
    """Makes such meters for whatever network, as a profile does."""
    return lambda model, groups: SteppedMeter(tuple(groups), step, per_step)


def stepped_profile(model, example, step: int = 8, samples: int = 30) -> LatencyProfile:
    """A profile made up for this machine, in which every layer's time rises with every `step` of its outputs."""
    groups = find_groups(model, example).groups
    layers = layer_shapes(model, example, groups)
    meter = SteppedMeter(groups, step)

    def sample(kept: Sequence[int]) -> Sample:
        fraction = meter.cost(kept) / meter.whole
        return Sample(tuple(kept), fraction, fraction, fraction)

    tables = (TimeTable("eager", 1, (meter.whole,), tuple(map(sample, design(groups, samples, 0))), ()),)
    named = tuple((group.name, group.n_filters) for group in groups)
    return LatencyProfile(conditions_of(torch.device("cpu")), named, layers, tables)
