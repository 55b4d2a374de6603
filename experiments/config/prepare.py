"""Everything that can be wrong with what the user gave is found here, before a run folder exists."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ...agent.saved_agent import check_agent
from ...envs.data.packing import packing_of
from ...envs.data.splits import Splits
from ...envs.groups.finding import LOOKS_AT_DATA, find_groups
from ...envs.networks.cost import count_cost
from ...envs.observation import STATISTIC_NAMES
from ...envs.repair.reconstruction import Reconstruction, ReconstructionSettings
from ...envs.repair.reconstruction_error import RECONSTRUCTION, check_readable
from ...envs.surgery.filter_group import FilterGroup, GroupPlan, select_groups
from ...envs.surgery.limits import AUTO, Limits, check_limits
from ...envs.surgery.targets import TIMED, Target, constraints_of
from ...envs.task import DenseBaseline, EvaluationSettings, PruningTask, measure_baseline
from ...errors import Notice, UserError
from ...rewards.try_and_learn import check_drop_bound
from ..deploy.clock import ClockSettings, ProfileClock, find_clock, keeping_times, resolved
from ..pruning.decide import CONTROLS
from ..pruning.input_checks import check_fineness, resolve_device, try_network, try_training
from ..pruning.layer_agents import call_policy_factory
from ..pruning.network_search import NetworkSearchSettings
from ..pruning.pretrained import load_pretrained
from ..pruning.trained_agents import agents_of, load_agents
from ..runs.console import Terminal
from ..runs.seeds import derive_seed
from ..training.augment import RandomCropFlip, check_augment, suits
from ..training.loop import TrainSettings
from .build import (
    NetworkConstructor,
    build_augment,
    build_policy_factory,
    build_reward,
    build_splits,
    build_target,
    load_network,
)
from .entry_point import is_decided, plain, settings, typed
from .ignored import Ignored, refuse_ignored

UNTIMED = Ignored(
    "profile",
    "nothing goes by time here: give target.latency or target.milliseconds, surgery.round_to=auto, or a reward with "
    "resource=seconds.",
    lambda config: not is_timed(config) and config.surgery.round_to != AUTO,
)


@dataclass
class Inputs:
    """The checked inputs of a pruning command; `dense` and `base` are None where the base is yet to be trained.

    `notes` is what makes accuracies of this network less than certain (`GroupPlan.notes`), `clock` the measured times
    of its device, where they are asked for, `plan` all groups of the network, whose blocks cannot vanish in it.
    """

    splits: Splits
    construct: NetworkConstructor
    device: torch.device
    groups: tuple[FilterGroup, ...]
    dense: nn.Module | None
    base: DenseBaseline | None
    layers: Sequence[str] | None
    evaluation: EvaluationSettings
    limits: Limits
    seed: int
    notes: tuple[str, ...] = ()
    clock: ProfileClock | None = None
    plan: GroupPlan | None = None

    def task(self, dense: nn.Module) -> PruningTask:
        """The pruning task on the dense network."""
        self.base = self.base or measure_baseline(dense, self.splits, self.device)
        task = PruningTask(
            dense,
            self.splits,
            base=self.base,
            settings=self.evaluation,
            layers=self.layers,
            seed=derive_seed(self.seed, "task"),
            device=self.device,
            limits=self.limits,
            clock=self.clock,
        )
        if dense is self.dense and self._holds_for_all_images and self.plan is not None:
            task.plan = self.plan
        return task

    @property
    def _holds_for_all_images(self) -> bool:
        """Whether the task would find the groups of `plan` again on another image."""
        return self.plan is not None and not self.limits.whole_blocks and LOOKS_AT_DATA not in self.plan.notes


def prepare(config: DictConfig, layers: Sequence[str] | None) -> Inputs:
    """Check data, network, checkpoint, base accuracy, drop bound and layer names; raises `UserError`.

    Args:
        config: root configuration of a command that looks at a trained network; `evaluation`, `surgery` and
            `drop_bound` are checked where it has them.
        layers: names or globs of the groups it is about; None for all.
    """
    if "drop_bound" in config:
        check_drop_bound(config.drop_bound)
    evaluation = settings(config.get("evaluation") or {}, EvaluationSettings)
    limits = settings(config.get("surgery") or {}, Limits)
    device = resolve_device(config.device)
    splits = build_splits(config)
    check_augmentation(config, splits)
    image, seed = splits.example, derive_seed(config.seed, "init")
    construct = NetworkConstructor(config.network, seed, image, packing_of(splits.fit))
    dense = base = None
    if config.checkpoint is not None:
        try_network(construct(), splits)
        dense = load_network(construct, config.checkpoint).to(device)
        base = measure_baseline(dense, splits, device)
    example = image.to(device)
    model = dense if dense is not None else construct().eval().to(device)
    try_network(model, splits)
    check_losses(config, splits)
    plan = find_groups(model, example)
    groups = select_groups(plan, layers)
    try_training(model, splits, _trainings(config), groups)
    for note in plan.notes:
        warnings.warn(note, Notice, stacklevel=2)
    if "drop_bound" in config:
        check_fineness(config.drop_bound, len(splits.reward))
    if limits.round_to != AUTO:
        check_limits(limits, model, plan, groups)
    clock = build_clock(config, model, example, limits)  # as late as can be: it may measure for minutes
    if limits.round_to == AUTO:
        limits = resolved(limits, clock, model, groups)
        config.surgery.round_to = limits.round_to
        check_limits(limits, model, plan, groups)
    return Inputs(
        splits,
        construct,
        device,
        groups,
        dense,
        base,
        layers,
        evaluation,
        limits,
        config.seed,
        plan.notes,
        clock,
        plan,
    )


def chosen_layers(config: DictConfig) -> list[str] | None:
    """Names or globs of the groups to decide on; a target of time that is typed beside an experiment asks for all.

    The shipped experiments prune the first convolutions of blocks, as papers do, and most of the time is not there.
    """
    given = typed()
    asked = [f"target.{name}" for name in TIMED if given.get(f"target.{name}") is not None]
    layers: list[str] | None = plain(config.layers)
    if layers is None or not asked or is_decided("layers"):
        return layers
    warnings.warn(
        f"{asked[0]} decides on every layer that can be pruned, residual streams and depthwise layers among them; the "
        f"experiment's own are kept to with layers=[{','.join(repr(each) for each in layers)}].",
        Notice,
        stacklevel=2,
    )
    config.layers = None
    return None


def build_clock(config: DictConfig, model: nn.Module, example: torch.Tensor, limits: Limits) -> ProfileClock | None:
    """The measured times that a target, a reward or widths go by: from a file, or measured here with a bar."""
    if "profile" not in config:
        if limits.round_to == AUTO:
            raise UserError(f"surgery.round_to={AUTO} is for prune, apply and train-agent; give a number of channels.")
        return None
    chosen, terminal = settings(config.profile, ClockSettings), Terminal(config.quiet)
    return find_clock(model, example, chosen, chosen.file, terminal, timed=is_timed(config), limits=limits)


def is_timed(config: DictConfig) -> bool:
    """Whether the target, or else the reward of the layers' agents, is one of time."""
    target = build_target(config.target) if "target" in config else None
    if target is not None or "reward" not in config:
        return target is not None and target.is_timed
    return getattr(build_reward(config.reward), "resource", None) == "seconds"


def check_augmentation(config: DictConfig, splits: Splits) -> None:
    """Check the augmentation of the fit images; a default that does not suit them is left out, with a `Notice`.

    Shifts and mirroring suit images with classes: they move what coordinates and maps are about.
    """
    augment = build_augment(config.augment)
    if isinstance(augment, RandomCropFlip) and not is_decided("augment") and not suits(splits.fit):
        why = "it moves images, and their targets are no classes (augment=shift asks for it)"
        if len(splits.fit.image_shape) != 3:
            kind = "signals or volumes" if packing_of(splits.fit) is None else "several inputs"
            why = f"it is for images, and these are {kind}"
        warnings.warn(f"The default augmentation is left out: {why}.", Notice, stacklevel=2)
        config.augment = augment = None
    check_augment(augment, splits.fit)


def check_losses(config: DictConfig, splits: Splits) -> None:
    """Refuse label smoothing in any training of a command where the loss knows none, with a `UserError`."""
    targets = splits.fit.batch(torch.arange(1))[1]
    for chosen in _trainings(config):
        splits.objective.check_smoothing(chosen.label_smoothing, targets)


def _trainings(config: DictConfig) -> list[TrainSettings]:
    """The settings of every training of a command, that of the base network last."""
    nodes = (OmegaConf.select(config, name) for name in ("finetune", "recovery.train", "train", "base"))
    return [settings(node, TrainSettings) for node in nodes if node is not None]


def check_controls(names: Sequence[str], inputs: Inputs) -> None:
    """Refuse a control that is no criterion, or that cannot judge every layer."""
    unknown = [name for name in names if name not in CONTROLS]
    if unknown:
        raise UserError(f"controls has {unknown[0]!r}; expected any of {', '.join(CONTROLS)}.")
    if RECONSTRUCTION in names:
        check_readable(inputs.construct() if inputs.dense is None else inputs.dense, inputs.groups)


def check_search(config: DictConfig, inputs: Inputs) -> None:
    """Check what the agents of a search are made of, and the saved ones it starts from; raises `UserError`."""
    build_reward(config.reward)
    call_policy_factory(build_policy_factory(config.policy), n_filters=inputs.groups[0].n_filters, n_weights=9)
    if config.warm_start is None:
        return
    names = [group.name for group in inputs.groups]
    known = agents_of(load_agents(config.warm_start), names, config.warm_start, "warm_start")
    if set(names) <= set(known):
        refuse_ignored(config, [Ignored("policy", "warm_start brings an agent for each of these layers.")])
    for group in inputs.groups:
        if group.name in known:
            agent = known[group.name]
            tied = {"n_filters": group.n_filters} if "n_filters" in agent.facts["policy"]["kwargs"] else {}
            check_agent(agent, statistic_names=STATISTIC_NAMES, **tied)


def check_network_search(config: DictConfig, inputs: Inputs) -> None:
    """Check what the agent of a whole network is made of, and that its target can be met; raises `UserError`."""
    if (where := settings(config.network_search, NetworkSearchSettings).reads) is not None:
        load_pretrained(where)
    repair = settings(config.repair, ReconstructionSettings)
    target = build_target(config.target)
    assert target is not None
    check_targets(inputs, [target], repair if config.evaluation.compensate else None)


def check_targets(inputs: Inputs, targets: Sequence[Target], repair: ReconstructionSettings | None) -> None:
    """Refuse targets that cannot be met, and a network that cannot be repaired, with a `UserError`."""
    dense = inputs.construct().eval().to(inputs.device) if inputs.dense is None else inputs.dense
    example = inputs.splits.example.to(inputs.device)
    cost, limits = count_cost(dense, example), inputs.limits.resolved(inputs.plan or find_groups(dense, example))
    with keeping_times(inputs.clock):
        for target in targets:
            goal = constraints_of(target, dense, cost, inputs.groups, inputs.clock)
            goal.check()
            goal.check([limits.counts(dense, group)[0] for group in inputs.groups])
    if repair is not None:
        Reconstruction(dense, example, repair)  # refuses what it cannot follow
