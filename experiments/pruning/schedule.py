"""The pruning schedule: one layer after another is decided, verified, cut for real and, if wished, recovered."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...envs.groups.verification import difference
from ...envs.networks.checkpoint import load_checkpoint, save_weights
from ...envs.networks.modes import evaluating
from ...envs.surgery.cutting import prune
from ...envs.surgery.group_cost import pruned_cost
from ...envs.surgery.kept_channels import KeptChannels
from ...envs.task import LayerTask, PruningTask, replace_model
from ...errors import UserError, first_line
from ...rewards.outcome import Outcome, RewardFunction
from ..runs.folder import RunFolder, file_name, read_json
from ..runs.seeds import derive_seed
from .decide import Decider, Decision

NETWORK = "network.safetensors"
TOLERANCE = 0.005  # a few images may change sides: masked networks run with batch normalisation folded in
IMAGES, LOGITS_TOLERANCE = 16, 1e-3  # float32 weights of any size; what is wrong is wrong by far more
ORDERS = ("forward", "backward", "largest_first")


@dataclass(frozen=True)
class LayerRecord:
    """What happened to one layer; accuracies are fractions on the whole reward split.

    Attributes:
        name: the filter group.
        n_filters, n_kept: filters before and after.
        keep: the mask over the filters the layer had, one bool each.
        decided_by: "agent", "best sampled mask", "nothing fits", "surgery limits" or the frozen decider's name.
        pruned_accuracy: right after the cut.
        recovered_accuracy: after recovery (equal to the former without one).
        within_bound: whether base minus `pruned_accuracy` is at most the drop bound.
        search_seconds, recovery_seconds: wall-clock time.
        facts: of the search (updates, mask-images, ...).
    """

    name: str
    n_filters: int
    n_kept: int
    keep: list[bool]
    decided_by: str
    pruned_accuracy: float
    recovered_accuracy: float
    within_bound: bool
    search_seconds: float
    recovery_seconds: float
    facts: dict[str, Any]


class Recovery(Protocol):
    """Brings a freshly cut network back: returns a new network (or the same) that is not worse."""

    def __call__(self, task: PruningTask, seed: int, working: Path) -> nn.Module:
        """Return the recovered network."""
        ...


class Watcher(Protocol):
    """Told about every layer as it begins and ends."""

    def layer_begins(self, position: int, total: int, layer: LayerTask) -> None:
        """A layer's turn has come."""
        ...

    def layer_ends(self, position: int, total: int, record: LayerRecord) -> None:
        """A layer is cut (or was, in an earlier part of this run)."""
        ...


def check_order(order: str) -> None:
    """Refuse an order that is none."""
    if order not in ORDERS:
        raise UserError(f"order is {order!r}; expected one of {', '.join(ORDERS)}.")


class Schedule:
    """Decide, verify, cut and recover layer by layer; every finished layer is on disk before the next begins.

    Args:
        decide: decides one layer.
        reward: ranks alternatives when the decision breaks the bound; None prefers the fewest filters.
        drop_bound: the accuracy one may lose from the dense network, a fraction; None verifies nothing.
        recover: brings the network back after a cut; None leaves it as it is.
        order: "forward" (low to high, the paper's), "backward" or "largest_first" (by MACs that hang on the layer).
        seed: of the run; every layer has its own, derived from it.
    """

    def __init__(
        self,
        decide: Decider,
        reward: RewardFunction | None,
        drop_bound: float | None,
        recover: Recovery | None = None,
        order: str = "forward",
        seed: int = 0,
    ) -> None:
        check_order(order)
        self.decide = decide
        self.reward = reward
        self.drop_bound = drop_bound
        self.recover = recover
        self.order = order
        self.seed = seed

    def run(
        self, task: PruningTask, folder: RunFolder, watcher: Watcher
    ) -> tuple[PruningTask, KeptChannels, list[LayerRecord]]:
        """Prune every layer of `task`; layers already finished in `folder` are taken from there.

        Returns the task on the smaller network, the original indices of everything kept, and a record a layer.
        """
        names = self.ordered(task)
        kept, records = KeptChannels(), []
        for position, name in enumerate(names):
            stage = f"layers/{position:02d}-{file_name(name)}"
            points = None
            if not (folder / stage).is_dir():
                layer = task.layer(name)
                watcher.layer_begins(position, len(names), layer)
                with folder.stage(stage) as working:
                    points = self._finish_layer(layer, kept, working)
            task, kept, record = _finished_layer(folder / stage, task, kept)
            if points is not None:
                task.correct = points  # of the same network, measured right before it was written
            records.append(record)
            watcher.layer_ends(position, len(names), record)
        return task, kept, records

    def ordered(self, task: PruningTask) -> list[str]:
        """Names of the groups in the order in which they are pruned."""
        groups = list(task.groups)
        if self.order == "backward":
            groups.reverse()
        if self.order == "largest_first":
            whole = task.cost.macs
            groups.sort(key=lambda group: pruned_cost(task.model, task.cost, {group: 1})[0] - whole)
        return [group.name for group in groups]

    def _finish_layer(self, layer: LayerTask, kept: KeptChannels, working: Path) -> Tensor:
        """Decide, verify, cut, recover, and leave everything in the layer's working folder.

        Returns the points of the network that is left on the reward split, (B,).
        """
        seed = derive_seed(self.seed, layer.group.name)
        started = time.perf_counter()
        decision = self._decided(layer, working, seed)
        keep, decided_by, masked_accuracy = self._verified(layer, decision)
        model = layer.cut(keep)
        points, problem = _measured(layer, keep, model, masked_accuracy)
        if problem:
            keep, decided_by = torch.ones(layer.n_filters, dtype=torch.bool), f"skipped: {problem}"
            model, points = layer.task.model, layer.task.correct
        accuracy = layer.task.objective.fraction(points)
        left = replace_model(layer.task, model, kept.after(layer.task.model, {layer.group: keep}))
        searched = time.perf_counter()
        recovered = model
        if self.recover is not None and not bool(keep.all()):
            recovered = self.recover(left, derive_seed(seed, "recovery"), working)
        left_points = points if recovered is model else replace_model(left, recovered).correct
        record = LayerRecord(
            name=layer.group.name,
            n_filters=layer.n_filters,
            n_kept=int(keep.sum()),
            keep=keep.tolist(),
            decided_by=decided_by,
            pruned_accuracy=accuracy,
            recovered_accuracy=layer.task.objective.fraction(left_points),
            within_bound=self._fits(layer, accuracy),
            search_seconds=searched - started,
            recovery_seconds=time.perf_counter() - searched,
            facts={**decision.facts, **_judged(layer, keep), "recovered": recovered is not model},
        )
        save_weights(recovered, working / NETWORK)
        (working / "decision.json").write_text(json.dumps(asdict(record), indent=2, allow_nan=False) + "\n")
        return left_points

    def _decided(self, layer: LayerTask, working: Path, seed: int) -> Decision:
        """The decision with the limits of the surgery held, so that what is verified is what is cut."""
        if layer.is_fixed:
            return Decision(torch.ones(layer.n_filters, dtype=torch.bool), "surgery limits")
        decision = self.decide(layer, working, seed)
        allowed = layer.allowed(torch.stack([decision.keep, *decision.alternatives]).bool())
        return replace(decision, keep=allowed[0], alternatives=tuple(allowed[1:]))

    def _verified(self, layer: LayerTask, decision: Decision) -> tuple[Tensor, str, float]:
        """The decision if it holds the drop bound on the whole reward split, else the best alternative that does."""
        outcome = layer.outcomes(decision.keep[None])[0]
        if self._fits(layer, outcome.pruned_accuracy):
            return decision.keep, decision.source, outcome.pruned_accuracy
        outcomes = layer.outcomes(torch.stack(decision.alternatives)) if decision.alternatives else []
        fitting = [i for i, each in enumerate(outcomes) if self._fits(layer, each.pruned_accuracy)]
        if fitting:
            best = max(fitting, key=lambda i: self._worth(outcomes[i]))
            return decision.alternatives[best], "best sampled mask", outcomes[best].pruned_accuracy
        everything = torch.ones(layer.n_filters, dtype=torch.bool)
        return everything, "nothing fits", layer.outcomes(everything[None])[0].pruned_accuracy

    def _worth(self, outcome: Outcome) -> float:
        return -float(outcome.n_kept) if self.reward is None else self.reward(outcome).value

    def _fits(self, layer: LayerTask, accuracy: float) -> bool:
        # A hair of slack: two fractions of whole images may differ in the last bit.
        return self.drop_bound is None or layer.task.base.accuracy - accuracy <= self.drop_bound + 1e-9


def _measured(layer: LayerTask, keep: Tensor, model: nn.Module, masked_accuracy: float) -> tuple[Tensor, str | None]:
    """Points of the cut network on the reward split, (B,), and what is wrong with it, if anything is.

    Every group was verified before it was offered; here the decision itself is, on real weights and images: masked and
    cut give the same logits, and the same accuracy with everything folded in. A network that chooses its path by its
    data may still surprise. Then the layer stays as it was and is named. Where nothing was cut, nothing is measured.
    """
    task, images = layer.task, layer.task.reward_images[0][:IMAGES]
    if bool(keep.all()):
        return task.correct, None
    try:
        points = replace_model(task, model).correct
        with evaluating(task.model):
            apart = difference(task.model, {layer.group: keep}, images)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        return task.correct, f"the cut network does not run ({first_line(error)})"
    # One image may always change sides: of fewer than 200 it is more than the tolerance.
    tolerance = max(TOLERANCE, 1 / len(task.splits.reward) + 1e-9)
    agree = abs(task.objective.fraction(points) - masked_accuracy) <= tolerance and apart <= LOGITS_TOLERANCE
    return points, None if agree else "masked and cut network disagree"


def _judged(layer: LayerTask, keep: Tensor) -> dict[str, Any]:
    """How the layer's mask was judged: who reads the filters compensated, and who only masked, with the reason."""
    found = None if bool(keep.all()) else layer.compensation
    if found is None:
        return {"compensated": [], "not_compensated": {}}
    return {"compensated": list(found.moments), "not_compensated": dict(found.skipped)}


def stored_record(content: Any, file: Path, task: PruningTask) -> LayerRecord:
    """A layer's record as it was read from `file`; a `UserError` where it is not one of a layer of `task`."""
    try:
        record = LayerRecord(**content)
        group = task.layer(record.name).group
        keep = [type(one) is bool for one in record.keep]
        numbers = (record.pruned_accuracy, record.recovered_accuracy, record.search_seconds, record.recovery_seconds)
        whole = all(keep) and len(keep) == record.n_filters == group.n_filters and sum(record.keep) == record.n_kept
        whole &= record.n_kept > 0 or group.branch is not None
        whole &= isinstance(record.facts, dict) and isinstance(record.decided_by, str)
        whole &= isinstance(record.within_bound, bool) and all(type(each) in (int, float) for each in numbers)
    except (TypeError, ValueError, AttributeError, KeyError):
        whole = False
    if not whole:
        raise UserError(
            f"{str(file)!r} is damaged (it is no decision on a layer of this network); put back the file that the run "
            "wrote, or begin a new run."
        )
    return record


def _finished_layer(
    folder: Path, task: PruningTask, kept: KeptChannels
) -> tuple[PruningTask, KeptChannels, LayerRecord]:
    """Take a finished layer from its folder, as a resumed run does."""
    file = folder / "decision.json"
    record = stored_record(read_json(file), file, task)
    choices = {task.layer(record.name).group: torch.tensor(record.keep)}
    pruned = prune(task.model, choices)
    load_checkpoint(pruned, folder / NETWORK)
    kept = kept.after(task.model, choices)
    return replace_model(task, pruned, kept, trained=bool(record.facts.get("recovered"))), kept, record
