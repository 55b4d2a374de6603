"""The `reconstruction` criterion: what a network's loss is expected to pay for every filter that is given up.

For a filter group, what its consumers put out in the dense network is regressed on the filters that stay, and the
squared error of every output is weighed with the mean squared gradient of the loss there (an empirical Fisher
information; the second-order view of LeCun et al., "Optimal Brain Damage", 1989, at the outputs of a layer). Filters
are given up one after the other, always the one that adds the least (backward elimination). Errors of many filters do
not add up, so a network is cut in rounds: a part of the target, repaired in closed form, measured again. Nothing is
searched and nothing is trained: a forward and a backward pass over some hundred images per round, and small solves.

The regression is that of He et al. 2017 (arXiv 1707.06168, eq. 5), without its sparsity; weighing its outputs and
comparing groups by error per multiply-accumulate is ours.

Shapes: B images, N filters, S samples, K weights per output, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..data.objective import TOP1, Objective
from ..networks.batch_size import gradient_batch
from ..networks.hooks import removed_after
from ..networks.modes import evaluating
from ..surgery.cutoff import keep_best
from ..surgery.filter_group import Cut, FilterGroup
from ..surgery.folding import reading_weight
from ..surgery.group_matching import regrouped
from ..surgery.targets import Constraints
from .patches import inputs_at, obstacle
from .reconstruction import Reconstruction, ReconstructionSettings

RECONSTRUCTION = "reconstruction"
ERROR_IMAGES = 1000  # of the fit split, on which errors are measured
BATCH = 100
# Errors at the positions of one map are neither independent (their squares would add up, exponent 1) nor do they cancel
# (exponent 0); half way is best or near it at 50 and 70 % on two ResNet-20 (docs/decisions.md).
COHERENCE = 0.5
NEVER = 1e30  # the score of a filter that saves nothing
TILT = 1e-9  # between filters that go together
PER_ROUND = 0.2  # of the MACs at most; ResNet-20 at 70 %: 0.728 in one round, 0.764 in four, 0.779 in six
PER_TIMED_ROUND = 0.1  # of the time, of which less goes than of the MACs; ResNet-56 at 60 %: 0.840 by 0.2, 0.877 by 0.1


@dataclass(frozen=True)
class ErrorCurve:
    """What giving up the filters of one group costs.

    Attributes:
        order: (N,) int64, the filters from the first given up to the last one that stays.
        errors: (N,) float64; `errors[j]` is the expected loss per image once `order[: j + 1]` are gone. The last value
            is that of no filter at all.
        effective_rank: of what the consumers read, as a fraction of its dimensions: (tr G)^2 / (tr G^2 x dimensions)
            with G the Gram matrix, the mean over consumers.
    """

    order: Tensor
    errors: Tensor
    effective_rank: float = 0.0

    def keep(self, n_keep: int) -> Tensor:
        """The mask (N,) bool of the `n_keep` filters that stay longest."""
        mask = torch.zeros(len(self.order), dtype=torch.bool)
        mask[self.order[len(self.order) - n_keep :]] = True
        return mask

    def scores(self, saved: float | Sequence[float]) -> Tensor:
        """Scores (N,), comparable between groups: the error that giving up each filter adds, per cost that it saves.

        They never fall along `order`: where a filter is cheaper than the one given up before it, both go together.

        Args:
            saved: the cost of a filter; or, where costs have steps, what giving up the first 1, 2, ... filters of
                `order` saves: filters between two widths of which none pays by itself go together, and those behind the
                last width that saves anything stay longest.
        """
        if isinstance(saved, Sequence):
            added = self._stepped(saved)
        else:
            added = torch.diff(self.errors, prepend=self.errors.new_zeros(1)) / saved
        scores = torch.empty_like(added)
        scores[self.order] = torch.cummax(added, 0).values
        return scores

    def _stepped(self, saved: Sequence[float]) -> Tensor:
        """Slopes of the lower convex hull of error over cost saved, by place in `order`."""
        costs, errors = [0.0, *saved], [0.0, *self.errors.tolist()]
        added = torch.full_like(self.errors, NEVER)
        start = 0
        while True:
            paying = [place for place in range(start + 1, len(costs)) if costs[place] > costs[start]]
            if not paying:
                return added
            slopes = [(errors[place] - errors[start]) / (costs[place] - costs[start]) for place in paying]
            end = paying[min(range(len(paying)), key=lambda row: (slopes[row], -paying[row]))]
            # Of equal scores the ranking would keep the filters of lower numbers.
            tilt = 1 + TILT * torch.arange(end - start, dtype=added.dtype)
            added[start:end] = min(slopes) * tilt
            start = end


def error_curves(
    model: nn.Module,
    groups: Sequence[FilterGroup],
    images: Tensor,
    labels: Tensor,
    *,
    objective: Objective = TOP1,
    places: int = 32,
    ridge: float = 1e-3,
) -> dict[str, ErrorCurve]:
    """The curve of every group, by name.

    Args:
        model: the dense network, untouched.
        groups: whose filters may go.
        images, labels: (B, ...) of the fit split, on the device of the network.
        objective: whose loss is differentiated.
        places: positions per image and layer at which layers are read.
        ridge: relative to the mean energy of an input.

    Raises UserError for a group that no consumer can be regressed on (grouped convolutions, classes of their own).
    """
    readings = {group.name: _readings(model, group, places) for group in groups}
    _read(model, [reading for own in readings.values() for reading in own], images, labels, objective)
    curves = {group.name: _eliminate(group.n_filters, readings[group.name], ridge) for group in groups}
    return curves | _of_branches(groups, readings, curves)


def _of_branches(
    groups: Sequence[FilterGroup], readings: Mapping[str, Sequence[_Reading]], curves: Mapping[str, ErrorCurve]
) -> dict[str, ErrorCurve]:
    """The curves of groups that may keep nothing: what their branch added is then its mean, whichever of them it is."""
    ends = {reading.cut.module: reading for own in readings.values() for reading in own}
    found = {}
    for group in groups:
        if group.least or group.branch is None:
            continue
        last = ends.get(group.branch.chain[0])
        error = sum(each.error_of_mean() for each in (readings[group.name] if last is None else [last]))
        curve, errors = curves[group.name], curves[group.name].errors.clone()
        errors[-1] = max(error, float(errors[-2])) if len(errors) > 1 else error
        found[group.name] = replace(curve, errors=errors)
    return found


def check_readable(model: nn.Module, groups: Sequence[FilterGroup]) -> None:
    """Refuse what `error_curves` refuses, without a pass over images."""
    for group in groups:
        _readings(model, group, places=1)


def reconstruction_scores(
    model: nn.Module,
    constraints: Constraints,
    images: Tensor,
    labels: Tensor,
    *,
    objective: Objective = TOP1,
    repair: ReconstructionSettings | None = None,
    curves: Mapping[str, ErrorCurve] | None = None,
) -> dict[str, Tensor]:
    """Scores (N,) float64 by group name; `keep_best` makes them masks that hold `constraints` at the least error.

    Args:
        model: the dense network, untouched.
        constraints: what is to go of the groups that may be pruned; a part of it in every round.
        images, labels: (B, ...) of the fit split, on the device of the network.
        objective: whose loss is differentiated.
        repair: how the network is repaired between two rounds.
        curves: those of the dense network, if they are known; measured otherwise.

    Raises UserError for constraints that cannot be met, and as `error_curves`.
    """
    constraints.check()
    repair = repair or ReconstructionSettings(images=512, places=16)
    masks = {group.name: torch.ones(group.n_filters, dtype=torch.bool) for group in constraints.groups}
    if curves is None:
        curves = error_curves(model, constraints.groups, images, labels, objective=objective)
    scores = _scores_per_cost(curves, constraints, masks)
    per_round = PER_TIMED_ROUND if constraints.is_stepped else PER_ROUND
    n_rounds = math.ceil(constraints.removed / per_round - 1e-9)
    repairing = Reconstruction(model, images[: repair.images], repair) if n_rounds > 1 else None
    for number in range(1, n_rounds):
        assert repairing is not None
        masks = keep_best(constraints.eased(number, n_rounds), scores)
        choices = {group: masks[group.name] for group in constraints.groups}
        groups = regrouped(constraints.groups, model, choices)
        curves = error_curves(repairing.cut(choices), groups, images, labels, objective=objective)
        scores = _scores_per_cost(curves, constraints, masks)
    return scores


def _scores_per_cost(
    curves: Mapping[str, ErrorCurve], constraints: Constraints, masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Scores (N,) by group name for `keep_best`: error per cost saved; filters that are gone already come last."""
    counts = [int(masks[group.name].sum()) for group in constraints.groups]
    scores = {}
    for position, group in enumerate(constraints.groups):
        if counts[position] == 0:
            scores[group.name] = torch.full((group.n_filters,), -1.0, dtype=torch.float64)
            continue
        saved = constraints.saved(counts, position)
        per_filter = max(saved[0] if saved else 0.0, 1e-12)
        scores[group.name] = torch.full((group.n_filters,), -1.0, dtype=torch.float64)
        scores[group.name][masks[group.name]] = curves[group.name].scores(
            saved if constraints.is_stepped else per_filter
        )
    return scores


def _readings(model: nn.Module, group: FilterGroup, places: int) -> list[_Reading]:
    """One for each consumer that can be regressed; UserError where none can."""
    modules = {cut: model.get_submodule(cut.module) for cut in group.consumers}
    obstacles = {cut.module: obstacle(module, max_inputs=10**9) for cut, module in modules.items()}
    readings = [_Reading(module, cut, places) for cut, module in modules.items() if not obstacles[cut.module]]
    if not readings:
        what = "; ".join(f"{name!r}, which reads its filters, is {why}" for name, why in obstacles.items())
        what = what or "nothing reads its filters"
        raise UserError(
            f"The criterion 'reconstruction' cannot judge {group.name!r}: {what}; leave the layer out or choose "
            "another criterion."
        )
    return readings


class _Reading:
    """What one consumer of a group reads and how much the loss minds what it puts out."""

    def __init__(self, module: nn.Module, cut: Cut, places: int) -> None:
        self.module, self.cut, self.places = module, cut, places
        self.weight_KO = reading_weight(module).detach().flatten(1).T.double().cpu()
        self.gram = torch.zeros(len(self.weight_KO), len(self.weight_KO), dtype=torch.float64)
        self.fisher = torch.zeros(self.weight_KO.shape[1], dtype=torch.float64)
        self.mean = torch.zeros(len(self.weight_KO), dtype=torch.float64)
        self.n_samples = 0
        self._probes: list[Tensor] = []

    def hook(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Sum up the inputs; give the output a probe that collects its gradient."""
        rows = inputs_at(module, inputs[0].detach(), self.places).reshape(-1, len(self.gram))
        self.gram += (rows.T @ rows).cpu().double()
        self.mean += rows.sum(0).cpu().double()
        self.n_samples += len(rows)
        self._probes.append(torch.zeros_like(output, requires_grad=True))
        return output + self._probes[-1]

    def take_probes(self) -> list[Tensor]:
        """The probes since the last call: an output's shape each."""
        probes, self._probes = self._probes, []
        return probes

    def add_gradient(self, gradient: Tensor) -> None:
        """Add the squared gradients of a batch of outputs (B, O, ...) or (B, ..., O)."""
        axis = gradient.dim() - 1 if isinstance(self.module, nn.Linear) else 1
        squares = gradient.movedim(axis, -1).reshape(len(gradient), -1, len(self.fisher)).square()
        self.fisher += (squares.mean(1).sum(0) * squares.shape[1] ** COHERENCE).cpu().double()

    def error_of_mean(self) -> float:
        """The expected loss if every output is its mean, which is the best constant."""
        spread = self.gram - torch.outer(self.mean, self.mean)
        return float(((spread @ self.weight_KO) * self.weight_KO).sum(0).clamp_min(0.0) @ self.fisher)

    def effective_rank(self) -> float:
        """Participation ratio of the inputs' energy over its principal directions, as a fraction of their number."""
        energy = float(self.gram.square().sum()) * len(self.gram)
        return float(self.gram.trace().square()) / energy if energy > 0 else 0.0

    def blocks(self, n_filters: int) -> Tensor:
        """The columns of the Gram matrix that belong to each filter: (N, columns per filter) int64."""
        channels = torch.as_tensor(self.cut.channels).reshape(n_filters, -1)
        taps = reading_weight(self.module)[0, 0].numel()
        return (channels[:, :, None] * taps + torch.arange(taps)).flatten(1)


def _read(model: nn.Module, readings: Sequence[_Reading], images: Tensor, labels: Tensor, objective: Objective) -> None:
    """Fill the readings by one forward and backward pass; the model is the same afterwards, gradients included."""
    hooks = (reading.module.register_forward_hook(reading.hook) for reading in readings)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with removed_after(hooks), evaluating(model), torch.enable_grad():
            batch = gradient_batch(images, BATCH)
            for start in range(0, len(images), batch):
                rows = slice(start, start + batch)
                loss = objective.summed_loss(model(images[rows]), labels[rows])
                probes = [(reading, probe) for reading in readings for probe in reading.take_probes()]
                gradients = torch.autograd.grad(loss, [probe for _, probe in probes], materialize_grads=True)
                for (reading, _), gradient in zip(probes, gradients, strict=True):
                    reading.add_gradient(gradient)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    for reading in readings:
        reading.gram /= max(reading.n_samples, 1)
        reading.mean /= max(reading.n_samples, 1)
        reading.fisher /= len(images)


def _eliminate(n_filters: int, readings: Sequence[_Reading], ridge: float) -> ErrorCurve:
    """Backward elimination: again and again the filter goes whose loss the others make up for best.

    With G the Gram matrix of the inputs, P its inverse and A the weights that reproduce the outputs from the inputs
    that are left, giving up the block b adds |sqrt(F) A_b'|^2 in the norm of P_bb^-1; P and A are then downdated.
    """
    states = [_Elimination(reading, n_filters, ridge) for reading in readings]
    left = list(range(n_filters))
    order, errors, total = [], [], 0.0
    while left:
        index = torch.tensor(left)
        added = torch.stack([state.added(index) for state in states]).sum(0)
        best = int(added.argmin())
        total += float(added[best].clamp_min(0.0))
        order.append(left.pop(best))
        errors.append(total)
        for state in states:
            state.drop(order[-1])
    rank = sum(reading.effective_rank() for reading in readings) / len(readings)
    return ErrorCurve(torch.tensor(order), torch.tensor(errors, dtype=torch.float64), rank)


class _Elimination:
    """One consumer's regression while filters go."""

    def __init__(self, reading: _Reading, n_filters: int, ridge: float) -> None:
        gram = reading.gram
        strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
        self.inverse = torch.linalg.inv(gram + strength * torch.eye(len(gram), dtype=gram.dtype))
        self.weights = reading.weight_KO.clone()
        self.fisher = reading.fisher
        self.blocks = reading.blocks(n_filters)

    def added(self, left: Tensor) -> Tensor:
        """The error (n,) that giving up each of the filters `left` (n,) adds."""
        rows = self.blocks[left]
        inner = self.inverse[rows[:, :, None], rows[:, None, :]]
        weights = self.weights[rows]
        return (torch.linalg.solve(inner, weights) * weights).sum(1) @ self.fisher

    def drop(self, which: int) -> None:
        """Give one filter up: the others take over what they can."""
        rows = self.blocks[which]
        across = self.inverse[:, rows]
        inner = self.inverse[rows][:, rows]
        moved = torch.linalg.solve(inner, torch.cat([self.weights[rows], across.T], 1))
        self.weights -= across @ moved[:, : self.weights.shape[1]]
        self.inverse -= across @ moved[:, self.weights.shape[1] :]
        # Gone for good: rounding must not bring it back, and a later solve must stay regular.
        self.weights[rows] = 0.0
        self.inverse[rows] = 0.0
        self.inverse[:, rows] = 0.0
