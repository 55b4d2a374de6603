"""Verification of filter groups: masked at its consumers, a network answers as it does when cut for real."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from ...errors import summarised
from ..networks.module_kinds import Inputs, run
from ..surgery.cutting import prune
from ..surgery.filter_group import FilterGroup
from ..surgery.masking import masked_inputs

TOLERANCE, FLOAT32_TOLERANCE = 1e-9, 1e-4
# Of random inputs, trial after trial; the lengths have no common factor, so that all pairs come up.
SCALES, SHIFTS = (1.0, 0.1, 10.0), (0.0, 2.0, -2.0, 20.0, -20.0)


class Verifier:
    """Compares masked and pruned networks on a float64 copy with random parameters and random inputs.

    Random parameters, because a branch that is switched off in the given weights (a zero-initialised scale, a dead
    filter) would hide a wrong cut. A group holds for every set of weights or for none. A network that chooses its path
    by its data needs more than one of the `trials`: inputs of different size and sign.
    """

    def __init__(self, model: nn.Module, example_inputs: Inputs, seed: int = 0, trials: int = 1) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._probe = randomised(copy.deepcopy(model).cpu(), self._generator)
        self._trials = [self._drawn(example_inputs, trial) for trial in range(trials)]
        self._tolerance = TOLERANCE
        if not _runs(self._probe, self._trials[0]):
            # It makes float32 constants of its own: check in float32.
            self._probe = self._probe.float()
            self._trials = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, self._trials)
            self._tolerance = FLOAT32_TOLERANCE

    def _drawn(self, example_inputs: Inputs, trial: int) -> Inputs:
        """Random inputs; the first ones are standard normal, later ones larger, smaller, and shifted both ways."""
        scale, shift = SCALES[trial % len(SCALES)], SHIFTS[trial % len(SHIFTS)]

        def draw(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            return scale * _normal(value, self._generator) + shift

        return tree_map_only(Tensor, draw, example_inputs)

    def failures(self, groups: Sequence[FilterGroup]) -> dict[str, str]:
        """Why groups cannot be trusted, by name; the others have masked == pruned to 1e-9 of the largest output.

        All groups are cut at once first. Only if that fails is each one tried alone.
        """
        if len(groups) > 1 and self._failure(groups) is None:
            return {}
        found = {group.name: self._failure([group]) for group in groups}
        return {name: reason for name, reason in found.items() if reason}

    def _failure(self, groups: Sequence[FilterGroup]) -> str | None:
        for inputs, share in itertools.product(self._trials, (0.7, 0.4)):
            try:
                worst = difference(self._probe, {group: self._keep(group, share) for group in groups}, inputs)
            except Exception as error:
                return f"the network does not run without some of its filters ({summarised(error)})"
            if not worst <= self._tolerance:
                return f"cutting it does not equal masking it (relative difference {worst:.1e})"
        return None

    def _keep(self, group: FilterGroup, share: float) -> Tensor:
        order = torch.randperm(group.n_filters, generator=self._generator)
        return order < max(1, round(group.n_filters * share))


def difference(model: nn.Module, choices: Mapping[FilterGroup, Tensor], inputs: Inputs) -> float:
    """Largest difference between the masked and the pruned network, relative to the largest masked output.

    `model` must be in evaluation mode. Raises what the pruned network raises.
    """
    with torch.no_grad():
        with masked_inputs(model, choices):
            masked = _tensors(run(model, inputs))
        pruned = _tensors(run(prune(model, choices), inputs))
    worst = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        for a, b in zip(masked, pruned, strict=True)
        if a.numel()
    ]
    # max() would lose a nan that does not come first.
    return float(torch.tensor(worst, dtype=torch.float64).max()) if worst else 0.0


def randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """`model` itself in float64 and evaluation mode, all parameters and statistics redrawn."""
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 4
            shift = 1.0 if parameter.dim() == 1 else 0.0
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5
            parameter.copy_(shift + drawn)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(0.3 * _normal(module.running_mean, generator))
                module.running_var.copy_(1 + 0.3 * _normal(module.running_var, generator).tanh())
    return model


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    try:
        with torch.no_grad():
            run(model, inputs)
    except Exception:
        return False
    return True


def _tensors(outputs: Any) -> list[Tensor]:
    return [value for value in tree_leaves(outputs) if isinstance(value, Tensor)]
