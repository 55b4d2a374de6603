"""What a callback of the Python interface is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ...agent.learning.natural_evolution import NetworkTrainer
from ...agent.learning.trainer import Trainer
from ...envs.task import LayerTask
from ..pruning.halving import Trained
from ..pruning.schedule import LayerRecord
from ..training.loop import TrainProgress


@dataclass(frozen=True)
class Progress:
    """One step of the work; `print` is a callback, since `str` makes one line of it.

    Attributes:
        stage: "profile" (copies of the network were timed), "search" (one update of a layer's agent), "halving" (one of
            a search's best masks was trained), "layer" (a layer is cut), "recovery" or "finetune" (one epoch).
        name: the layer, or what found the mask; empty while fine-tuning.
        done, total: updates, masks, layers or epochs.
        metrics: of the step; accuracies and fractions in [0, 1], of an epoch of training also `images_per_second`.
    """

    stage: str
    name: str
    done: float
    total: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return f"{self.stage} {self.name} {self.done:g}/{self.total:g}: {shown}".replace("  ", " ")


Callback = Callable[[Progress], None]


class Reporter:
    """Turns what the parts of a run tell into `Progress`; a `Watcher` of the schedule."""

    def __init__(self, callback: Callback | None) -> None:
        self.callback = callback
        self.layer = ""
        self.stage, self.total, self.done = "", 0.0, 0.0

    def tell(self, stage: str, name: str, done: float, total: float, metrics: Mapping[str, float]) -> None:
        """Call the callback, if there is one."""
        if self.callback is not None:
            self.callback(Progress(stage, name, done, total, dict(metrics)))

    @contextmanager
    def progress(self, what: str, total: float) -> Iterator[Reporter]:
        """Steps of `advance_by` are of this stage inside."""
        self.stage, self.total, self.done = what, total, 0.0
        yield self

    def advance_by(self, step: float, detail: str | None = None) -> None:
        """Some more of the stage is done."""
        self.done += step
        self.tell(self.stage, detail or "", self.done, self.total, {})

    def layer_update(self, layer: LayerTask, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """One update of a layer's agent."""
        shown = {"reward": metrics["reward_mean"]}
        shown |= {name: metrics[f"info/{name}"] for name in ("kept_fraction", "accuracy_drop")}
        self.tell("search", layer.group.name, len(trainer.history), trainer.settings.updates, shown)

    def network(self, trainer: NetworkTrainer, metrics: Mapping[str, float]) -> None:
        """One update of the agent of all layers."""
        shown = {"reward": metrics["reward_mean"]}
        shown |= {name: metrics[f"info/{name}"] for name in ("macs_fraction", "accuracy_drop")}
        self.tell("search", "network", len(trainer.history), trainer.settings.updates, shown)

    def finalist(self, trained: Trained) -> None:
        """One mask was trained."""
        found = {"repaired": trained.candidate.repaired, "trained": trained.candidate.accuracy}
        found |= {"minibatches": trained.minibatches}
        self.tell("halving", trained.candidate.name, trained.done, trained.total, found)

    def epoch(self, stage: str, epochs: float, progress: TrainProgress) -> None:
        """One epoch of training."""
        name = self.layer if stage == "recovery" else ""
        shown = {"loss": progress.loss, "accuracy": progress.accuracy, "images_per_second": progress.images_per_second}
        self.tell(stage, name, progress.epoch, epochs, shown)

    def layer_begins(self, position: int, total: int, layer: LayerTask) -> None:
        """A layer's turn has come."""
        self.layer = layer.group.name

    def layer_ends(self, position: int, total: int, record: LayerRecord) -> None:
        """A layer is cut."""
        facts = {"kept_fraction": record.n_kept / record.n_filters, "accuracy": record.recovered_accuracy}
        self.tell("layer", record.name, position + 1, total, facts)

    def network_ends(self, records: Sequence[LayerRecord]) -> None:
        """All layers are cut at once."""
        for position, record in enumerate(records):
            self.layer_ends(position, len(records), record)
