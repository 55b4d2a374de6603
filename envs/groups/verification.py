"""Verification of filter groups: masked at its consumers, a network answers as it does when cut for real."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from ...errors import summarised
from ..data.randomness import randomness_restored
from ..networks.copying import copied
from ..networks.inputs import mapped, resized, tensors_in
from ..networks.module_kinds import Inputs, run
from ..surgery.cutting import prune
from ..surgery.filter_group import Branch, FilterGroup
from ..surgery.masking import masked_inputs
from ..surgery.whole_blocks import is_within
from .label_tracing import Shapes, shapes_in_training, shapes_of
from .operator_rules import HARD_SIZE

TOLERANCE, FLOAT32_TOLERANCE = 1e-9, 1e-4
# Of random inputs, trial after trial; the lengths have no common factor, so that all pairs come up.
SCALES, SHIFTS = (1.0, 0.1, 10.0), (0.0, 2.0, -2.0, 20.0, -20.0)
SEED = 0  # of random numbers that a network draws: the masked and the cut one draw the same
N_ROWS = 4  # images that a network sees together, if its answers depend on that
FIXED_SHAPE = re.compile(r"shape '(\[.*?\])' is invalid for input of size")


class Verifier:
    """Compares masked and pruned networks on a float64 copy with random parameters and random inputs.

    Random parameters, because a branch that is switched off in the given weights (a zero-initialised scale, a dead
    filter) would hide a wrong cut. A group holds for every set of weights or for none. A network that chooses its path
    by its data needs more than one of the `trials`: inputs of different size and sign. In training mode the cut network
    must run as well, and answer in the same shapes as the whole one.

    Args:
        model: the network, untouched.
        example_inputs: what it runs on.
        seed: of parameters, inputs and masks.
        trials: inputs to compare on.
        draws: what draws random numbers in evaluation mode, for the reasons.
        hints: what may be to blame, by group, if one turns out not to be removable.
        trained: shapes that the network answers in training mode (`shapes_in_training`); None does not ask for that.

    `batch_matters` says whether the answer to an image depends on the images beside it.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        seed: int = 0,
        trials: int = 1,
        draws: Sequence[str] = (),
        hints: Mapping[str, str] | None = None,
        trained: Shapes | None = None,
    ) -> None:
        self._draws, self._hints = draws, hints or {}
        self._generator = torch.Generator().manual_seed(seed)
        self._probe = randomised(nn.Module.cpu(copied(model)), self._generator)
        self._trials = [self._drawn(example_inputs, trial) for trial in range(trials)]
        self._tolerance = TOLERANCE
        if not _runs(self._probe, self._trials[0]):
            # It makes float32 constants of its own: check in float32.
            self._probe = nn.Module.float(self._probe)
            self._trials = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, self._trials)
            self._tolerance = FLOAT32_TOLERANCE
        self.batch_matters = _batch_matters(self._probe, self._trials[0])
        if self.batch_matters:
            self._trials = [_different_rows(inputs) for inputs in self._trials]
        self._trained = trained

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

        All groups are cut at once first. Only if that fails is each one tried alone, or if sizes may hang together in
        a way that cuts of equal share would hide (`HARD_SIZE`).
        """
        if len(groups) > 1 and HARD_SIZE not in self._hints.values() and self._failure(groups) is None:
            return {}
        found = {group.name: self._failure([group]) for group in groups}
        return {name: reason for name, reason in found.items() if reason}

    def _failure(self, groups: Sequence[FilterGroup]) -> str | None:
        for inputs, share in itertools.product(self._trials, (0.7, 0.4)):
            choices = {group: self._keep(group, share) for group in groups}
            try:
                smaller = prune(self._probe, choices)
                worst = _apart(self._probe, smaller, choices, inputs)
            except Exception as error:
                blamed = self._hints.get(groups[0].name) or self._fixed_shape(error, choices, inputs)
                return f"the network does not run without some of its filters ({blamed or summarised(error)})"
            if math.isnan(worst):
                return "the network answers NaN on random inputs, so that cut and masked it cannot be compared"
            if not worst <= self._tolerance:
                unequal = f"cutting it does not equal masking it (relative difference {worst:.1e})"
                return self._why_random(inputs) or unequal
        return self._failure_in_training(smaller)

    def vanishing(self, groups: Sequence[FilterGroup]) -> set[Branch]:
        """The branches of these groups that can be trusted to vanish: alone, and beside cuts of all other groups.

        As with cuts, many go at once first, but never one inside another, which would hide what becomes of it.
        """
        branches = list(dict.fromkeys(group.branch for group in groups if group.branch is not None))
        trusted: set[Branch] = set()
        for apart in _side_by_side(branches):
            if len(apart) > 1 and self._vanish(apart, groups):
                trusted.update(apart)
            else:
                trusted.update(branch for branch in apart if self._vanish([branch], groups))
        return trusted

    def _vanish(self, branches: Sequence[Branch], groups: Sequence[FilterGroup]) -> bool:
        none = {group: torch.zeros(group.n_filters, dtype=torch.bool) for group in groups if group.branch in branches}
        others = {group: self._keep(group, 0.7) for group in groups if group not in none}
        for choices, inputs in itertools.product((none, none | others), self._trials):
            try:
                smaller = prune(self._probe, choices)
                worst = _apart(self._probe, smaller, choices, inputs)
            except Exception:
                return False
            if not worst <= self._tolerance or self._failure_in_training(smaller):
                return False
        return True

    def _failure_in_training(self, smaller: nn.Module) -> str | None:
        if self._trained is None:
            return None
        try:
            got = shapes_in_training(smaller, self._trials[0])
        except Exception as error:
            return f"in training mode the network does not run without some of its filters ({summarised(error)})"
        if got != self._trained:
            return f"without some of its filters the network answers {got} in training mode instead of {self._trained}"
        return None

    def _why_random(self, inputs: Inputs) -> str | None:
        """What to say if the network draws random numbers, or simply answers otherwise the second time."""
        if not self._draws:
            with torch.no_grad():
                first, second = (tensors_in(run(self._probe, inputs)) for _ in range(2))
            if all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)):
                return None
        return (
            f"the network is random in evaluation mode ({', '.join(self._draws[:3]) or 'two runs differ'}), as with a "
            "functional dropout without training=self.training, so that cut and masked it cannot be compared"
        )

    def _fixed_shape(self, error: Exception, choices: Mapping[FilterGroup, Tensor], inputs: Inputs) -> str | None:
        """Several images may happen to fill a shape that is written down, and the error comes later; one does not."""
        if FIXED_SHAPE.search(str(error)) is None:
            try:
                with torch.no_grad():
                    run(prune(self._probe, choices), resized(inputs, 1))
            except Exception as alone:
                error = alone
        found = FIXED_SHAPE.search(str(error))
        if found is None:
            return None
        return (
            f"its forward reshapes to {found.group(1)}, whatever is left of the filters; x.flatten(1), or sizes taken "
            "from x.shape, would follow"
        )

    def _keep(self, group: FilterGroup, share: float) -> Tensor:
        order = torch.randperm(group.n_filters, generator=self._generator)
        return order < max(1, round(group.n_filters * share))


def _side_by_side(branches: Sequence[Branch]) -> list[list[Branch]]:
    """The branches in as few lists as may be, none of which holds a branch and another one inside it."""
    found: list[list[Branch]] = []
    for branch in branches:
        own = (*branch.inside, branch.tail)
        free = (
            each
            for each in found
            if not any(is_within(name, (*other.inside, other.tail)) for other in each for name in own)
            and not any(is_within(name, own) for other in each for name in (*other.inside, other.tail))
        )
        place = next(free, None)
        if place is None:
            found.append([branch])
        else:
            place.append(branch)
    return found


def difference(model: nn.Module, choices: Mapping[FilterGroup, Tensor], inputs: Inputs) -> float:
    """Largest difference between the masked and the pruned network, relative to the largest masked output.

    `model` must be in evaluation mode. Raises what the pruned network raises, and ValueError if its answer has another
    shape.
    """
    return _apart(model, prune(model, choices), choices, inputs)


def _apart(model: nn.Module, smaller: nn.Module, choices: Mapping[FilterGroup, Tensor], inputs: Inputs) -> float:
    with torch.no_grad():
        with masked_inputs(model, choices), randomness_restored(SEED):
            masked = tensors_in(run(model, inputs))
        with randomness_restored(SEED):
            pruned = tensors_in(run(smaller, inputs))
    if shapes_of(masked) != shapes_of(pruned):
        raise ValueError(f"it answers {shapes_of(pruned)} instead of {shapes_of(masked)}")
    worst = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        for a, b in zip(masked, pruned, strict=True)
        if a.numel()
    ]
    # max() would lose a nan that does not come first.
    return float(torch.tensor(worst, dtype=torch.float64).max()) if worst else 0.0


def randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """`model` itself in float64 and evaluation mode, all parameters and statistics redrawn."""
    nn.Module.double(model).eval()  # by the class: an attribute of the user's may have the method's name
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 4
            shift = 1.0 if parameter.dim() == 1 else 0.0
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5
            parameter.copy_(shift + drawn)
        for module in nn.Module.modules(model):
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(0.3 * _normal(module.running_mean, generator))
                module.running_var.copy_(1 + 0.3 * _normal(module.running_var, generator).tanh())
                continue
            for buffer in module.buffers(recurse=False):
                # Frozen statistics and scales, which may all be equal: what is a variance stays positive.
                if buffer.is_floating_point() and buffer.numel() == max(buffer.shape, default=1) > 1:
                    buffer.mul_(1 + 0.3 * _normal(buffer, generator).tanh())
                    buffer.add_(0.1 * _normal(buffer, generator).abs())
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


def _different_rows(inputs: Inputs, n_rows: int = N_ROWS) -> Inputs:
    """That many rows, no two alike."""

    def change(value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.dim() == 0:
            return value
        return value + _normal(value, torch.Generator().manual_seed(SEED)).to(value)

    return mapped(resized(inputs, n_rows), change)


def _batch_matters(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the answer to an image depends on the images beside it; False where that cannot be told."""
    try:
        rows = _different_rows(inputs, 2)
        together, alone = (_answers(model, rows, size) for size in (2, 1))
    except Exception:
        return False
    pairs = [(a[:1], b) for a, b in zip(together, alone, strict=True) if a.dim() and b.dim() and len(a) == 2 * len(b)]
    return any(bool(a.isfinite().all()) and not (a - b).abs().max() <= 1e-3 * a.abs().max() for a, b in pairs)


def _answers(model: nn.Module, rows: Inputs, size: int) -> list[Tensor]:
    with torch.no_grad(), randomness_restored(SEED), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a standard deviation of one image
        return tensors_in(run(model, resized(rows, size)))
