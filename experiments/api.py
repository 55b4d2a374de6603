"""The Python interface: a trained network and two datasets in, a smaller network out. No configuration files.

With the same settings and the same seed it decides what `keepdrop prune` decides, filter by filter.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..agent.policy import SetPolicy
from ..agent.trainer import AgentSettings
from ..envs.augment import Augment
from ..envs.cost import count_cost
from ..envs.evaluate import accuracy_on
from ..envs.latency import Latency, measure_latency
from ..envs.measure import TOP1, Loss, Measure
from ..envs.metrics import Metric
from ..envs.pruned_file import KeptChannels, save_pruned
from ..envs.reconstruction import ReconstructionSettings
from ..envs.splits import Source, Splits
from ..envs.target import Target
from ..envs.task import JudgeSettings, PruningTask
from ..envs.train_settings import TrainSettings
from ..envs.training import check_augment, fit_network
from ..rewards.errors import UserError
from ..rewards.outcome import RewardFunction
from ..rewards.try_and_learn import TryAndLearn, check_drop_bound
from .api_agents import LayerAgents
from .api_data import labelled_data, three_splits
from .api_folder import open_folder
from .api_progress import Callback, Reporter
from .api_training import OwnLoop, OwnRecovery, retrained
from .checks import PolicyFactory, resolve_device, try_network
from .network_decide import TrainNetworkAgent
from .network_schedule import NetworkSchedule
from .network_search import NetworkSearchSettings
from .recover import Recover, RecoverySettings
from .schedule import LayerRecord, Recovery, Schedule
from .seeds import derive_seed

FINETUNE = TrainSettings(epochs=5, lr=0.02, distill_weight=0.5)
POLICY: PolicyFactory = partial(SetPolicy, warm_start="taylor")


@dataclass(frozen=True)
class Settings:
    """How the search goes; the defaults are those of `keepdrop prune`, but for the reward images.

    Args:
        reward_from: where reward images come from, which the network must not have been trained on: "test", or "train"
            where it was trained elsewhere.
        reward_size: images masks are scored on; None: a fifth of the source, at most 2,000.
        split_seed: draws the reward images.
        order: "forward" (low to high), "backward" or "largest_first".
        masks: sampled an update of an agent.
        images: reward images a mask; None for all.
        agent: how each layer's agent is trained.
        judge: how masks are judged, compensation among it.
        reward: what an agent is trained on; None: `TryAndLearn(drop_bound)`.
        policy: makes a layer's policy from whichever of n_filters, n_weights, n_statistics, statistic_names and seed
            it asks for.
        bn_images: fit images on which batch normalisation is measured anew after a cut; 0 leaves it.
        network: how the agent of all layers is trained, with `macs_removed`.
        metric: what stands wherever accuracy does: (outputs, targets) -> a score in [0, 1] an image, higher is better.
        loss: what training minimises and Taylor looks at, (outputs, targets) -> their mean loss; None: cross-entropy
            for integer targets, the mean squared error for floating ones.
    """

    reward_from: Source = "test"
    reward_size: int | None = None
    split_seed: int = 0
    order: str = "forward"
    masks: int = 16
    images: int | None = 300
    agent: AgentSettings = field(default_factory=AgentSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    reward: RewardFunction | None = None
    policy: PolicyFactory = POLICY
    bn_images: int = 0
    network: NetworkSearchSettings = field(default_factory=NetworkSearchSettings)
    metric: Metric = TOP1.metric
    loss: Loss | None = None

    def __post_init__(self) -> None:
        if self.masks < 2:
            raise UserError(f"masks is {self.masks}; expected 2 or more: rewards are compared with one another.")


@dataclass(frozen=True)
class PruningResult:
    """What pruning did; accuracies are fractions on the report images, which nothing was chosen on.

    Attributes:
        model: the smaller network, fine-tuned, in evaluation mode.
        dense: a copy of what came in.
        layers: what happened to each layer.
        base_accuracy, pruned_accuracy, accuracy: before, after the last cut, after fine-tuning.
        base_macs, macs: multiply-accumulates an image, before and after.
        base_params, params: parameters, before and after.
        bound_held: whether the drop bound held after every cut, on the reward images.
        kept: which channels of the dense network are left.
        example: one image (1, C, H, W).
    """

    model: nn.Module
    dense: nn.Module
    layers: tuple[LayerRecord, ...]
    base_accuracy: float
    pruned_accuracy: float
    accuracy: float
    base_macs: int
    macs: int
    base_params: int
    params: int
    bound_held: bool
    kept: KeptChannels
    example: torch.Tensor

    def facts(self) -> dict[str, Any]:
        """Every number of the result; JSON types only."""
        hidden = ("model", "dense", "kept", "example", "layers")
        return {name: value for name, value in vars(self).items() if name not in hidden} | {
            "layers": [asdict(record) for record in self.layers]
        }

    def save(self, folder: str | Path, constructor: Mapping[str, Any] | None = None) -> None:
        """Write `model.safetensors` and `architecture.json`, which `keepdrop.load_pruned(folder, make_dense)` reads."""
        save_pruned(self.model, folder, kept=self.kept, constructor=constructor, facts=self.facts())

    def latency(self, batch_sizes: Sequence[int] = (1, 64), repeats: int = 20) -> tuple[Latency, ...]:
        """Seconds of both networks, measured side by side here and now."""
        models = {"base": self.dense, "pruned": self.model}
        return tuple(measure_latency(models, self.example, batch_sizes=batch_sizes, repeats=repeats))

    def __str__(self) -> str:
        return (
            f"accuracy {self.base_accuracy:.2%} -> {self.accuracy:.2%}, "
            f"MACs {self.base_macs:,} -> {self.macs:,} ({self.macs / self.base_macs - 1:+.1%}), "
            f"parameters {self.base_params:,} -> {self.params:,} ({self.params / self.base_params - 1:+.1%})"
        )


def prune(
    model: nn.Module,
    train: Any,
    test: Any,
    *,
    macs_removed: float | None = None,
    drop_bound: float = 0.02,
    layers: Sequence[str] | None = None,
    recover: TrainSettings | OwnLoop | None = None,
    finetune: TrainSettings | OwnLoop | None = FINETUNE,
    augment: Augment | None = None,
    settings: Settings | None = None,
    progress: Callback | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> PruningResult:
    """Train an agent on each layer, remove filters for real, fine-tune, and measure on images nothing was chosen on.

    Args:
        model: trained, maps images (B, C, H, W) to logits (B, classes), or to what the metric takes; never changed.
        train, test: each a map-style dataset of (floating image tensor, integer label) or a pair of tensors
            (images, labels), normalised as the network takes them; with another metric than top-1 targets of any shape.
        macs_removed: a target, the fraction of the network's MACs to remove (0.4: 40 %): one agent chooses all layers
            at once. None: an agent a layer removes what `drop_bound` allows.
        drop_bound: accuracy that may be lost before fine-tuning, a fraction (0.02: two points). With a target it stops
            nothing: `bound_held` says whether it held.
        layers: names or globs of the layers to prune; None: all that can be.
        recover: training after each cut, kept only where it helps: settings, or a function that trains a network in
            place with a loop of your own; None: none.
        finetune: training at the end, likewise.
        augment: of training images, (images, generator) -> images.
        settings: how the search goes.
        progress: called with a `Progress` for every update, layer and epoch; `print` will do.
        folder: keeps agents, decisions and networks; called again with the same arguments, an interrupted run goes on.
        seed: same seed, same result, bit for bit on a CPU.
        device: "cpu", "cuda", "mps" or "auto".

    Raises:
        UserError: what was given cannot be used; the sentence says why and what to do.
    """
    settings = settings or Settings()
    check_drop_bound(drop_bound)
    where = resolve_device(device)
    data, measure = labelled_data(train, test), Measure(settings.metric, settings.loss)
    splits = three_splits(data, settings.reward_from, settings.reward_size, settings.split_seed, measure)
    check_augment(augment, splits.fit)
    dense = copy.deepcopy(model).eval().to(where)
    try_network(dense, splits)
    task = PruningTask(
        dense, splits, settings=settings.judge, layers=layers, seed=derive_seed(seed, "task"), device=where
    )
    reporter = Reporter(progress)
    recovery = _recovery(recover, settings, dense, augment, reporter)
    schedule = _schedule(settings, macs_removed, drop_bound, recovery, reporter, seed)
    with ExitStack() as stack:
        path = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        asked = {"drop_bound": drop_bound, "layers": layers, "recover": recover, "seed": seed, "settings": settings}
        place = open_folder(path, task, asked | {"macs_removed": macs_removed})
        pruned, kept, records = schedule.run(task, place, reporter)
    tuned = _finetuned(pruned.model, finetune, dense, splits, augment, reporter, derive_seed(seed, "finetune"))
    return _result(dense, pruned.model, tuned, splits, kept, records)


def _schedule(
    settings: Settings,
    macs_removed: float | None,
    drop_bound: float,
    recovery: Recovery | None,
    reporter: Reporter,
    seed: int,
) -> Schedule | NetworkSchedule:
    """Layer by layer within the drop bound, or all layers at once at a MACs target."""
    if macs_removed is not None:
        agent = TrainNetworkAgent(settings.network, Target(macs_removed, "network"), reporter.network)
        repair = ReconstructionSettings() if settings.judge.compensate else None
        return NetworkSchedule(agent, repair, drop_bound, seed, recovery)
    reward = settings.reward or TryAndLearn(drop_bound)
    agents = LayerAgents(settings.policy, reward, settings.agent, settings.masks, settings.images, reporter)
    return Schedule(agents, reward, drop_bound, recovery, settings.order, seed)


def _recovery(
    chosen: TrainSettings | OwnLoop | None,
    settings: Settings,
    dense: nn.Module,
    augment: Augment | None,
    reporter: Reporter,
) -> Recovery | None:
    if callable(chosen):
        return OwnRecovery(chosen)
    train = chosen or TrainSettings(epochs=0)
    report = partial(reporter.epoch, "recovery", train.epochs)
    return Recover(RecoverySettings(settings.bn_images, train), dense, augment, report)


def _finetuned(
    pruned: nn.Module,
    chosen: TrainSettings | OwnLoop | None,
    dense: nn.Module,
    splits: Splits,
    augment: Augment | None,
    reporter: Reporter,
    seed: int,
) -> nn.Module:
    if callable(chosen):
        return retrained(pruned, chosen, seed)
    model = copy.deepcopy(pruned)
    if chosen is not None:
        teacher = dense if chosen.distill_weight > 0 else None
        report = partial(reporter.epoch, "finetune", chosen.epochs)
        fit_network(model, splits.fit, chosen, seed=seed, augment=augment, teacher=teacher, progress=report)
    return model.eval()


def _result(
    dense: nn.Module,
    pruned: nn.Module,
    tuned: nn.Module,
    splits: Splits,
    kept: KeptChannels,
    records: Sequence[LayerRecord],
) -> PruningResult:
    example = splits.reward.batch(torch.arange(1))[0].to(next(dense.parameters()).device)
    before, after = count_cost(dense, example), count_cost(tuned, example)
    base, cut, final = (accuracy_on(model, splits.report) for model in (dense, pruned, tuned))
    return PruningResult(
        model=tuned,
        dense=dense,
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
        example=example,
    )
