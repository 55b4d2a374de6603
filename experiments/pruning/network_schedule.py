"""All layers decided together, cut at once and repaired; takes a `Schedule`'s place."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...agent.learning.natural_evolution import NetworkTrainer
from ...envs.networks.checkpoint import load_checkpoint, save_weights
from ...envs.one_shot import GROUP_NAME, OneShotTask
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.surgery.cutting import prune
from ...envs.surgery.filter_group import FilterGroup
from ...envs.surgery.kept_channels import KeptChannels
from ...envs.task import PruningTask, replace_model
from ...errors import UserError
from ..runs.folder import RunFolder, read_json
from ..runs.seeds import derive_seed
from .network_decide import NetworkDecider
from .schedule import NETWORK, LayerRecord, Recovery, stored_record

STAGE = "network"
STATE = "network-state.pt"
DECISIONS = "decisions.json"


class NetworkWatcher(Protocol):
    """Told about the one decision."""

    def network_ends(self, records: Sequence[LayerRecord]) -> None:
        """The network is cut (or was, in an earlier part of this run); accuracies are the same in every record."""
        ...


class NetworkSchedule:
    """One decision for the whole network; it is on disk, whole, before anything else begins.

    Args:
        decide: decides on all groups.
        repair: of the cut network; None leaves it as cut.
        recover: brings the repaired network further back; None leaves it.
        drop_bound: the accuracy one may lose from the dense network, a fraction: only said to be held or not, since
            here the MACs are given; None holds always.
        seed: of the run.
    """

    def __init__(
        self,
        decide: NetworkDecider,
        repair: ReconstructionSettings | None,
        drop_bound: float | None,
        seed: int = 0,
        recover: Recovery | None = None,
    ) -> None:
        self.decide, self.repair, self.drop_bound, self.seed = decide, repair, drop_bound, seed
        self.recover = recover

    def run(
        self, task: PruningTask, folder: RunFolder, watcher: NetworkWatcher
    ) -> tuple[PruningTask, KeptChannels, list[LayerRecord]]:
        """Decide, cut, repair; a finished decision is taken from `folder`. Returns what `Schedule.run` does."""
        if not (folder / STAGE).is_dir():
            with folder.stage(STAGE) as working:
                self._finish(task, working, folder / STATE)
            (folder / STATE).unlink(missing_ok=True)
        left, kept, records = finished(folder / STAGE, task)
        watcher.network_ends(records)
        return left, kept, records

    def _finish(self, task: PruningTask, working: Path, state: Path) -> None:
        started, seed = time.perf_counter(), derive_seed(self.seed, GROUP_NAME)
        one_shot = OneShotTask(task, self.repair)
        decision = self.decide(one_shot, working, state, seed)
        kept = KeptChannels().after(task.model, _choices(task, decision.masks))
        cut = replace_model(task, one_shot.cut(one_shot.joined(decision.masks)), kept)
        accuracy, searched = cut.accuracy, time.perf_counter()
        left = cut
        if self.recover is not None and not all(bool(keep.all()) for keep in decision.masks.values()):
            left = replace_model(cut, self.recover(cut, derive_seed(seed, "recovery"), working))
        recovered, n_groups = left.accuracy, len(decision.masks)
        records = [
            LayerRecord(
                name=name,
                n_filters=len(keep),
                n_kept=int(keep.sum()),
                keep=keep.tolist(),
                decided_by=decision.source,
                pruned_accuracy=accuracy,
                recovered_accuracy=recovered,
                within_bound=self.drop_bound is None or task.base.accuracy - accuracy <= self.drop_bound + 1e-9,
                search_seconds=(searched - started) / n_groups,
                recovery_seconds=(time.perf_counter() - searched) / n_groups,
                facts=dict(decision.facts),
            )
            for name, keep in decision.masks.items()
        ]
        save_weights(left.model, working / NETWORK)
        text = json.dumps([asdict(record) for record in records], indent=2, allow_nan=False)
        (working / DECISIONS).write_text(text + "\n")


def finished(stage: Path, task: PruningTask) -> tuple[PruningTask, KeptChannels, list[LayerRecord]]:
    """Take a finished decision from its folder, as a resumed run does."""
    file = stage / DECISIONS
    records = [stored_record(each, file, task) for each in read_json(file, list, "a list")]
    if {record.name for record in records} != {group.name for group in task.groups}:
        raise UserError(f"{str(file)!r} decides on other layers than this run has; put back the file that it wrote.")
    choices = _choices(task, {record.name: torch.tensor(record.keep) for record in records})
    pruned = prune(task.model, choices)
    load_checkpoint(pruned, stage / NETWORK)
    kept = KeptChannels().after(task.model, choices)
    return replace_model(task, pruned, kept), kept, records


def show_update(trainer: NetworkTrainer, metrics: Mapping[str, float]) -> str:
    """One update for a person."""
    kept, drop = metrics.get("info/kept_fraction", 0.0), metrics.get("info/accuracy_drop", 0.0)
    return f"update {len(trainer.history)}, kept {kept:.0%} of the filters, drop {100 * drop:.1f} points"


def _choices(task: PruningTask, masks: Mapping[str, Tensor]) -> dict[FilterGroup, Tensor]:
    return {group: masks[group.name] for group in task.groups}
