"""What every call from Python that prunes has in common: its images, its network, its training, its result."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from ...envs.data.datasets import from_datasets
from ...envs.data.objective import Objective
from ...envs.data.packing import packing_of
from ...envs.evaluation.mask_evaluator import accuracy_on
from ...envs.groups.finding import find_groups
from ...envs.networks.answers import as_called, as_given, ready_network
from ...envs.networks.copying import copied
from ...envs.networks.cost import count_cost
from ...envs.surgery.kept_channels import KeptChannels
from ...envs.surgery.latency_profile import LatencyProfile
from ...envs.surgery.limits import AUTO, Limits, check_limits
from ...envs.surgery.targets import Target
from ...envs.task import PruningTask
from ...errors import Notice, UserError
from ...ranges import SEED, check_number
from ..deploy.clock import find_clock, keep_profile, keeping_times, resolved
from ..pruning.input_checks import resolve_device, try_network, try_training
from ..pruning.network_schedule import NetworkSchedule
from ..pruning.recover import Recover, RecoverySettings
from ..pruning.schedule import LayerRecord, Recovery, Schedule
from ..runs.seeds import derive_seed
from ..training.augment import Augment, check_augment
from ..training.devices import check_devices, leads
from ..training.guarded import Judgement, fine_tune, keep_better
from ..training.train_settings import TrainSettings
from .data import three_splits
from .job_folder import open_folder
from .own_training_loop import OwnLoop, OwnRecovery, retrained
from .progress import Callback, Reporter
from .result import PruningResult
from .settings import Settings

Profile: TypeAlias = str | Path | LatencyProfile


class Job:
    """One call; see `keepdrop.prune` for the arguments.

    Raises:
        UserError: the images, the network, the layers or the limits cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        test: Any,
        *,
        layers: Sequence[str] | None,
        augment: Augment | None,
        settings: Settings | None,
        progress: Callback | None,
        seed: int,
        device: str,
        target: Target | None = None,
        profile: Profile | None = None,
    ) -> None:
        self.settings, self.augment, self.seed = settings or Settings(), augment, seed
        check_number("seed", seed, SEED)
        chosen, where = self.settings, resolve_device(device)
        data, objective = from_datasets(train, test), Objective(chosen.metric, chosen.loss)
        self.splits = three_splits(data, chosen.reward_from, chosen.reward_size, chosen.split_seed, objective)
        check_augment(augment, self.splits.fit)
        plain, self.notes = ready_network(model, self.splits.example, chosen.output, packing_of(data.train))
        for note in self.notes:
            warnings.warn(note, Notice, stacklevel=4)
        self.dense = plain.eval().to(where)
        try_network(self.dense, self.splits)
        self.reporter = Reporter(progress)
        timed = getattr(chosen.reward, "resource", None) == "seconds" if target is None else target.is_timed
        source, limits = profile or chosen.profile.file, chosen.surgery
        if profile is not None and not timed and limits.round_to != AUTO:
            raise UserError(
                "profile would do nothing: nothing goes by time here; give latency or milliseconds, "
                "Limits(round_to='auto'), or a reward with resource='seconds'."
            )
        example, how = self.splits.example.to(where), chosen.profile
        self.clock = find_clock(self.dense, example, how, source, self.reporter, timed=timed, limits=limits)
        with keeping_times(self.clock):
            self.task = self._checked_task(layers, limits, target, where)

    def _checked_task(
        self, layers: Sequence[str] | None, limits: Limits, target: Target | None, device: torch.device
    ) -> PruningTask:
        """With a multiple of channels where widths go by time; UserError for a target that cannot be met."""
        if limits.round_to == AUTO:
            groups = find_groups(self.dense, self.splits.example.to(device)).groups
            limits = resolved(limits, self.clock, self.dense, groups)
        task = PruningTask(
            self.dense,
            self.splits,
            settings=self.settings.evaluation,
            layers=layers,
            seed=derive_seed(self.seed, "task"),
            device=device,
            limits=limits,
            clock=self.clock,
        )
        check_limits(limits, self.dense, task.plan, task.groups)
        if target is not None:
            goal = task.constraints(target)
            goal.check()
            goal.check([task.limits.counts(self.dense, group)[0] for group in task.groups])
        return task

    def check_training(self, *chosen: TrainSettings | OwnLoop | None) -> None:
        """Try one step of keepdrop's own training, if there is to be one; UserError where it fails.

        Where torchrun or Slurm started several processes for it, the first one goes on, and the others only do their
        share of the training and exit.

        What makes the network's accuracies uncertain is said here, as well: nothing was searched yet.
        """
        own = [each for each in chosen if isinstance(each, TrainSettings)]
        devices, where = max((each.devices for each in own), default=1), self.task.device
        check_devices(own, where)
        if not leads(devices, where.type):
            sys.exit(0)
        try_training(self.dense, self.splits, own, self.task.groups)
        for note in self.task.plan.notes:
            warnings.warn(note, Notice, stacklevel=3)
        self.notes += self.task.plan.notes

    def recovery(self, chosen: TrainSettings | OwnLoop | None) -> Recovery:
        """What follows each cut."""
        if callable(chosen):
            return OwnRecovery(chosen)
        train = chosen or TrainSettings(epochs=0)
        report = partial(self.reporter.epoch, "recovery", train.epochs)
        return Recover(RecoverySettings(self.settings.bn_images, train), self.dense, self.augment, report)

    def run(
        self,
        schedule: Schedule | NetworkSchedule,
        finetune: TrainSettings | OwnLoop | None,
        folder: str | Path | None,
        asked: Mapping[str, Any],
    ) -> PruningResult:
        """Prune as `schedule` says, fine-tune, measure; a folder is gone on with if it began with what was `asked`."""
        with ExitStack() as stack:
            where = folder or stack.enter_context(tempfile.TemporaryDirectory())
            place = open_folder(where, self.task, {"seed": self.seed, "settings": self.settings, **asked})
            stack.callback(place.close)
            stack.enter_context(place.naming())
            keep_profile(self.clock, place.path)
            pruned, kept, records = schedule.run(self.task, place, self.reporter)
        tuned, judged = self._finetuned(pruned.model, finetune)
        if judged is not None and (sentence := judged.sentence(self.task.objective.name)):
            warnings.warn(sentence, Notice, stacklevel=3)
        return replace(self._result(pruned.model, tuned, kept, records), finetuning=judged)

    def _finetuned(
        self, pruned: nn.Module, chosen: TrainSettings | OwnLoop | None
    ) -> tuple[nn.Module, Judgement | None]:
        seed = derive_seed(self.seed, "finetune")
        if chosen is None:
            return copied(pruned).eval(), None
        if not isinstance(chosen, TrainSettings):
            return keep_better(pruned, retrained(pruned, chosen, seed), self.splits)
        teacher = self.dense if chosen.distill_weight > 0 else None
        report = partial(self.reporter.epoch, "finetune", chosen.epochs)
        return fine_tune(pruned, self.splits, chosen, seed=seed, augment=self.augment, teacher=teacher, progress=report)

    def _result(
        self, pruned: nn.Module, tuned: nn.Module, kept: KeptChannels, records: Sequence[LayerRecord]
    ) -> PruningResult:
        splits, dense = self.splits, self.dense
        example = splits.example.to(next(dense.parameters()).device)
        before, after = count_cost(dense, example), count_cost(tuned, example)
        base, cut, final = (accuracy_on(model, splits.report) for model in (dense, pruned, tuned))
        return PruningResult(
            model=as_given(tuned),
            cut=as_given(copied(pruned).eval()),
            dense=as_given(dense),
            layers=tuple(records),
            base_accuracy=base,
            pruned_accuracy=cut,
            accuracy=final,
            base_macs=before.macs,
            macs=after.macs,
            base_params=before.params,
            params=after.params,
            bound_held=all(record.within_bound for record in records),
            kept=kept,
            example=as_called(dense, example),
            metric=self.task.objective.name,
            notes=self.notes,
            measured=tuned,
            splits=splits,
        )
