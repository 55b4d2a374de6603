"""An iterated pruning, step by step: every step trained, recorded on disk, and found again by a resumed run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ...envs.data.objective import display_name
from ...envs.networks.checkpoint import load_checkpoint, save_weights
from ...envs.networks.copying import copied
from ...envs.networks.cost import count_cost
from ...envs.surgery.cutting import prune
from ...envs.surgery.filter_group import FilterGroup
from ...envs.surgery.group_matching import regrouped
from ...envs.surgery.kept_channels import KeptChannels
from ...envs.task import PruningTask, replace_model
from ...errors import UserError
from ..config.build import build_augment
from ..config.entry_point import settings
from ..runs.console import Terminal
from ..runs.context import RunContext
from ..runs.folder import RunFolder, read_json
from ..runs.seeds import derive_seed
from ..training.augment import Augment
from ..training.loop import TrainSettings
from .steps import Allowed, Goal, IterateSettings, from_lists, removal, train_and_score

NETWORK, RECORD = "network.safetensors", "step.json"


def how(config: DictConfig) -> IterateSettings:
    """How filters go."""
    train = settings(config.train, TrainSettings)
    return IterateSettings(config.criterion, config.step, config.minibatches, config.macs_weight, train)


def goal(config: DictConfig) -> Goal:
    """When to stop."""
    bounded = config.target.hold_bound or config.target.removed is None
    return Goal(config.target.removed, config.target.resource, config.drop_bound if bounded else None)


@dataclass(frozen=True)
class State:
    """The network after some steps: its groups as they are now, what is left of the dense one, scores for the next."""

    model: nn.Module
    groups: tuple[FilterGroup, ...]
    kept: KeptChannels
    left: Mapping[str, list[int]]

    def after(self, masks: Mapping[FilterGroup, Tensor]) -> State:
        """The same with the masks (N,) cut for real."""
        left = dict(self.left)
        for group, keep in masks.items():
            left[group.name] = [left[group.name][i] for i in keep.nonzero().flatten().tolist()]
        groups = regrouped(self.groups, self.model, masks)
        return State(prune(self.model, masks), groups, self.kept.after(self.model, masks), left)


class Iteration:
    """All steps of one run. Each is on disk, whole, before the next begins, and depends on nothing but the one before.

    Args:
        task: of the dense network.
        context: of the run; in its folder `steps/NNNN/` holds a step's record, the newest one its network as well.
    """

    def __init__(self, task: PruningTask, context: RunContext) -> None:
        self.task, self.config, self.folder = task, context.config, context.folder
        self.terminal, self.tracker, config = context.terminal, context.tracker, context.config
        self.settings, self.goal = how(config), goal(config)
        self.augment: Augment | None = build_augment(config.augment)
        self.records: list[dict[str, Any]] = []

    def run(self) -> State:
        """Step until the goal is met; returns the last network that is within the bound, if there is one to hold."""
        state = self._begin()
        with self.terminal.progress(f"iterate, {self.config.criterion}", 1.0) as bar:
            while True:
                state = self._trained(state, len(self.records))
                self._show(bar)
                masks = {} if self._is_over() else self._removal(state)
                if not masks:
                    self._say_why_it_stops()
                    break
                state = state.after(masks)
        if self._is_broken() and len(self.records) > 1:
            return self._back()
        return state

    def _begin(self) -> State:
        everything = {group.name: list(range(group.n_filters)) for group in self.task.groups}
        return State(copied(self.task.model), self.task.groups, KeptChannels(), everything)

    def _trained(self, state: State, position: int) -> State:
        """Train the freshly cut network of a step, or take it from the folder; its record is appended."""
        stage = self._stage(position)
        if not (self.folder / stage).is_dir():
            started = time.perf_counter()
            model = copied(state.model)
            scores = self._train(model, state, derive_seed(self.config.seed, "step", str(position)))
            record = self._record(state, model, position, scores, time.perf_counter() - started)
            with self.folder.stage(stage) as working:
                save_weights(model, working / NETWORK)
                RunFolder(working).write_json(RECORD, record)
            self._forget(position - 2)
        self.records.append(self._stored_record(position))
        if not (self.folder / stage / NETWORK).is_file():
            return state  # an old step of a resumed run: only what it cut matters
        return self._loaded(state, position)

    def _loaded(self, state: State, position: int) -> State:
        model = copied(state.model)
        load_checkpoint(model, self.folder / self._stage(position) / NETWORK)
        return State(model.eval(), state.groups, state.kept, state.left)

    def _train(self, model: nn.Module, state: State, seed: int) -> dict[str, Tensor]:
        teacher = self.task.model if self.settings.train.distill_weight > 0 else None
        data = self.task.splits.fit
        return train_and_score(model, state.groups, data, self.settings, seed, augment=self.augment, teacher=teacher)

    def _record(
        self, state: State, model: nn.Module, position: int, scores: Mapping[str, Tensor], seconds: float
    ) -> dict[str, Any]:
        """One point of the curve, what it keeps (numbered as in the dense network), and the scores for the next."""
        cost = count_cost(model, self.task.example)
        return {
            "step": position,
            "n_filters": sum(group.n_filters for group in state.groups),
            "macs": cost.macs,
            "params": cost.params,
            "accuracy": replace_model(self.task, model).accuracy,
            "seconds": seconds,
            "left": dict(state.left),
            "scores": {name: each.tolist() for name, each in scores.items()},
        }

    def _stored_record(self, position: int) -> dict[str, Any]:
        """What a step left on disk, checked in form."""
        file = self.folder / self._stage(position) / RECORD
        record: dict[str, Any] = read_json(file)
        if record.get("step") != position or not self._is_record(record):
            raise UserError(f"{str(file)!r} is damaged (no step of this run); put back what the run wrote.")
        return record

    def _is_record(self, record: Mapping[str, Any]) -> bool:
        numbers = ("n_filters", "macs", "params", "accuracy", "seconds")
        left, scores = record.get("left"), record.get("scores")
        if not (isinstance(left, dict) and isinstance(scores, dict)):
            return False
        return all(type(record.get(name)) in (int, float) for name in numbers) and all(
            isinstance(left.get(group.name), list)
            and left[group.name]
            and set(map(repr, left[group.name])) <= set(map(repr, range(group.n_filters)))
            and isinstance(scores.get(group.name), list)
            and len(scores[group.name]) == len(left[group.name])
            and all(type(each) in (int, float) for each in scores[group.name])
            for group in self.task.groups
        )

    def _removal(self, state: State) -> dict[FilterGroup, Tensor]:
        """What goes next: as recorded by the next step, if there is one, else by rank."""
        if (self.folder / self._stage(len(self.records))).is_dir():
            done = self._stored_record(len(self.records))
            gone = {
                name: [i for i, filter_ in enumerate(state.left[name]) if filter_ not in set(kept)]
                for name, kept in done["left"].items()
            }
            return from_lists(state.groups, {name: each for name, each in gone.items() if each})
        scores = {name: torch.tensor(each, dtype=torch.float64) for name, each in self.records[-1]["scores"].items()}
        base, example = self.task.base.cost, self.task.example
        return removal(state.model, state.groups, scores, self.settings, self.goal, base, example, self._allowed(state))

    def _allowed(self, state: State) -> Allowed:
        """What the limits leave open now; they count and number filters as the dense network has them."""
        task = self.task
        if task.limits.none:
            return Allowed()
        protected = {
            name: {place for place, filter_ in enumerate(state.left[name]) if filter_ in stay}
            for name, stay in task.limits.protect.items()
            if name in state.left
        }
        return Allowed({group.name: task.limits.counts(task.model, group) for group in task.groups}, protected)

    def _is_over(self) -> bool:
        last = self.records[-1]
        return self.goal.is_met(self.task.base.cost, last["macs"], last["params"]) or self._is_broken()

    def _is_broken(self) -> bool:
        bound = self.goal.drop_bound
        return bound is not None and self.task.base.accuracy - self.records[-1]["accuracy"] > bound + 1e-9

    def _say_why_it_stops(self) -> None:
        if not self._is_over() and self.goal.removed is not None:
            self.terminal.warn(
                f"{100 * self.goal.removed:g} % of the {self.goal.resource} cannot be removed: no layer can lose any "
                "more filters."
            )

    def _back(self) -> State:
        """The step before the last one, which is still on disk; the last one broke the bound."""
        self.records.pop()
        state = self._begin()
        left = self.records[-1]["left"]
        masks = {}
        for group in self.task.groups:
            masks[group] = torch.zeros(group.n_filters, dtype=torch.bool)
            masks[group][left[group.name]] = True
        return self._loaded(state.after(masks), len(self.records) - 1)

    def _forget(self, position: int) -> None:
        """Weights of a step that neither a resumed run nor a broken bound needs any more."""
        if position >= 0:
            self.folder.forget_hash(f"{self._stage(position)}/{NETWORK}")
            (self.folder / self._stage(position) / NETWORK).unlink(missing_ok=True)

    def _stage(self, position: int) -> str:
        return f"steps/{position:04d}"

    def _show(self, bar: Terminal) -> None:
        last, base = self.records[-1], self.task.base.cost
        gone = 1 - last[self.config.target.resource] / getattr(base, self.config.target.resource)
        done = gone / (self.goal.removed or 1.0)
        text = f"{last['n_filters']} filters, MACs {100 * (last['macs'] / base.macs - 1):+.1f} %"
        text += f", {display_name(self.task.objective.name)} {100 * last['accuracy']:.2f} %"
        bar.advance(min(done, 1.0), text)
        if not self.terminal.console.is_terminal:
            self.terminal.say(f"[{last['step']}] {text}")
        point = {name: last[name] for name in ("accuracy", "macs", "params", "n_filters")}
        self.tracker.scalars("iterate", point, last["step"])
