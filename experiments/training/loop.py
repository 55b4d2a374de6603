"""One loop for training a base network and for fine-tuning a pruned one: SGD, a schedule, distillation, averaging.

Shape suffixes: B images of a batch.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Required, TypedDict

import torch
from torch import Tensor, nn

from ...envs.data.images import LabelledImages, batches_of
from ...envs.data.metrics import targets_known
from ...envs.data.objective import TOP1, Objective, objective_of, output_of
from ...envs.networks.copying import copied
from ...envs.networks.memory_layout import CONTIGUOUS, common_layout, layout_of, order_weights, weights_in_order
from ...envs.networks.modes import modes_restored
from ...errors import UserError
from .augment import Augment, check_augment
from .averaging import Average
from .compiling import Compiled
from .descent import begin_momentum, descend, optimizer_of
from .devices import Team, quiet, stepping, synchronised, working_together
from .feed import Feed
from .graphs import WARM, Capture, Graphed, Tensors, capture_of
from .heads import Heads
from .snapshot import TrainingState, load_snapshot, save_snapshot
from .tally import Tally
from .teaching import Teacher, bare
from .train_settings import TrainSettings

__all__ = ["Progress", "TrainProgress", "TrainResult", "TrainSettings", "fit_network", "recalibrate_bn"]

PATIENCE = 100  # steps that a GPU is let run ahead before somebody looks at the losses
WORTH = 20  # steps that make up for the capture of a graph


@dataclass(frozen=True)
class TrainProgress:
    """Where training stands: steps done of all, and mean loss and accuracy (or score) since the last report.

    `images_per_second` is the speed of the epoch's steps, of all devices together, with the time that reading takes.
    """

    step: int
    n_steps: int
    epoch: int
    lr: float
    loss: float
    accuracy: float
    images_per_second: float = field(default=math.nan, compare=False)


@dataclass(frozen=True)
class TrainResult:
    """Steps taken in all (an interrupted run's included), and one record an epoch of this call."""

    n_steps: int
    history: tuple[TrainProgress, ...] = ()


Progress = Callable[[TrainProgress], None]


class FitOptions(TypedDict, total=False):
    """What `fit_network` is given alike by all who train with it; see there."""

    seed: Required[int]
    augment: Augment | None
    teacher: nn.Module | None
    device: torch.device | str | None


def fit_network(
    model: nn.Module,
    data: LabelledImages,
    settings: TrainSettings,
    *,
    seed: int,
    augment: Augment | None = None,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
    snapshot: Path | None = None,
    device: torch.device | str | None = None,
    epoch_ends: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Train `model` in place with the loss that `data` brings; mode and frozen parameters come back as they were.

    Same seed, same weights, bitwise, on a CPU with the same number of threads. `teacher` (untouched) is needed when
    `distill_weight` > 0. `progress` is called after every epoch. With `snapshot`, weights and momentum are written
    there after every epoch, and a later call with the same arguments resumes from it, to the same final weights; the
    file stays, so that a finished training is not repeated. `epoch_ends` is told about an epoch before its snapshot is
    written. With `ema` the model is the average of its weights while `epoch_ends` looks at it, and in the end. The
    model is moved to `device`, which defaults to its own. A network that is frozen as a whole is trained as a whole.
    Where it answers with several outputs in training mode, `heads` says which is which.

    Raises DivergedError when the loss stops being finite, and UserError when there are no parameters, the data holds
    fewer than 2 images, the teacher is missing, `augment` would move images away from their target maps, or the
    snapshot belongs to another training.
    """
    with modes_restored(model, teacher), _thawed(model):
        run = _Run.build(model, data, replace(settings, lr=settings.rate), seed, augment, teacher, device)
        with run.prepared():
            return _fitted(run, snapshot, progress, epoch_ends)


def _fitted(
    run: _Run, snapshot: Path | None, progress: Progress | None, epoch_ends: Callable[[TrainProgress], None] | None
) -> TrainResult:
    identity = run.identity() if snapshot is not None else ""
    state = TrainingState(run.model, run.optimizer, identity, average=run.average)
    if snapshot is not None and snapshot.exists():
        state.step = load_snapshot(state, snapshot)
    history = []
    with run.started(state.step):
        while state.step < run.n_steps:
            record = run.epoch(state.step)
            state.step = record.step
            history.append(record)
            if epoch_ends is not None:
                with run.averaged():
                    epoch_ends(record)
            if snapshot is not None:
                save_snapshot(state, snapshot)
            if progress is not None:
                progress(record)
    if run.average is not None:
        run.average.swap()
    return TrainResult(run.n_steps, tuple(history))


@dataclass
class _Run:
    """What one call of fit_network works with."""

    model: nn.Module
    data: LabelledImages
    settings: TrainSettings
    seed: int
    augment: Augment | None
    teacher: nn.Module | None
    device: torch.device
    optimizer: torch.optim.SGD
    steps_per_epoch: int
    n_steps: int
    objective: Objective = TOP1

    def __post_init__(self) -> None:
        self.heads = Heads(self.model)
        self.ahead = runs_ahead(self.device) and self.settings.devices == 1
        self.average: Average | None = None
        self.team: Team | None = None
        self.called: Callable[[Tensor], Any] = self.model
        self.taught: Teacher | None = None
        self.capture: Capture | None = None
        self.graphed: Graphed | None = None
        self.places: list[int] = []
        self.known = False

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The average begins; on a GPU weights lie in the order that suits it inside, and as they did afterwards."""
        with weights_in_order(self.model, self._weight_layout()):
            self.average = None if self.settings.ema is None else Average(self.model, self.settings.ema)
            yield

    @contextmanager
    def started(self, step: int) -> Iterator[None]:
        """Everything is in training mode inside, and the helpers of a training on several devices do their share."""
        if self.settings.devices == 1 or step >= self.n_steps:
            with self._ready(step):
                yield
            return
        with working_together(self.settings.devices, self.device, DivergedError) as team:
            facts = (self.model, self.data, self.settings, self.seed, self.augment, self.teacher)
            unused = self._leaves_some()
            team.send(partial(_help, facts, self.optimizer.state_dict(), step, unused))
            with self._ready(step, team, unused):
                yield

    @contextmanager
    def _ready(self, step: int, team: Team | None = None, unused: bool = False) -> Iterator[None]:
        self.model.train()
        if self.teacher is not None:
            self.teacher.eval()
        left = self.n_steps - step
        self.feed = Feed(self.data, self.augment, self.device, stay=self.ahead and left >= self.steps_per_epoch)
        self.known = self.ahead and self.feed.is_binary
        if team is None:
            with self._equipped():
                yield
            return
        self.taught = self._taught()
        with synchronised(self.model, self.settings.sync_batch_norm), quiet():
            self.team, self.called = team, team.wrapped(self.model, unused)
            try:
                yield
            finally:
                self.team, self.called = None, self.model

    @contextmanager
    def _equipped(self) -> Iterator[None]:
        """With a teacher that remembers, and with graphs where a device has them and the steps pay for them.

        Those that are left do not count: resumed, the same operations follow.
        """
        if self.ahead and self.settings.graphs and self.n_steps >= WARM + WORTH:
            self.capture = capture_of(self.device)
        if self.capture is not None:
            begin_momentum(self.optimizer)
        if self.settings.compile:
            self.called = Compiled(self.model, self.settings.batch_size)
        self.taught = self._taught()
        try:
            yield
        finally:
            if self.graphed is not None:
                self.optimizer.zero_grad()  # gradients lie in the graph's memory
            self.capture = self.graphed = self.taught = None
            self.called = self.model

    def _graph(self) -> None:
        """The step as a graph; a new one where somebody has moved weights in memory between two epochs."""
        if self.capture is None:
            return
        places = [value.data_ptr() for value in (*self.model.parameters(), *self.model.buffers())]
        if places != self.places:
            self.graphed, self.places = Graphed(self._take, self.capture, "The step of this training"), places

    def _taught(self) -> Teacher | None:
        """The teacher, if the loss asks for one; on a GPU a copy with weights in the order that suits it."""
        if self.teacher is None or self.settings.distill_weight <= 0:
            return None
        network = bare(self.teacher)
        if self._weight_layout() != CONTIGUOUS:
            network = copied(network).to(self.device).requires_grad_(False)
            order_weights(network, self._weight_layout())
        called = Compiled(network, self.settings.batch_size) if self.settings.compile else network

        def answer(images: Tensor) -> Tensor:
            with torch.no_grad(), self._precision():
                return output_of(called(images))

        n_images = len(self.data) if self.augment is None and self.settings.devices == 1 else None
        if self.capture is None:
            return Teacher(self.teacher, answer, n_images)
        graphed = Graphed(lambda given, _: (answer(*given),), self.capture, "The teacher")
        return Teacher(self.teacher, lambda images: graphed((images,))[0], n_images)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def _leaves_some(self) -> bool:
        """Whether a step gives some parameters no gradient, tried on a copy and two images."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            trial = replace(self, model=copied(self.model).train())
            images, labels = self.data.batch(torch.arange(2))
            images = images.to(self.device)
            images = images.to(memory_format=self._layout(images))
            trial._loss(images, labels.to(self.device), lambda: None)[0].backward()
        return any(each.requires_grad and each.grad is None for each in trial.model.parameters())

    def help(self, team: Team, step: int, unused: bool) -> None:
        """This process's share of the steps that are left."""
        with self._ready(step, team, unused), suppress(DivergedError):
            while step < self.n_steps:
                step = self.epoch(step).step

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model is the average of its weights inside, where there is one."""
        if self.average is None:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    @classmethod
    def build(
        cls,
        model: nn.Module,
        data: LabelledImages,
        settings: TrainSettings,
        seed: int,
        augment: Augment | None,
        teacher: nn.Module | None,
        device: torch.device | str | None,
    ) -> _Run:
        """Check the arguments and derive the rest."""
        if settings.distill_weight > 0 and teacher is None:
            raise UserError(
                f"distill_weight={settings.distill_weight} needs a teacher network; give one or set it to 0."
            )
        if len(data) < 2:
            raise UserError(f"Training needs at least 2 images, got {len(data)}.")
        check_augment(augment, data)
        objective = objective_of(data)
        objective.check_smoothing(settings.label_smoothing, data.batch(torch.arange(1))[1])
        steps_per_epoch = _steps_per_epoch(data, settings)
        where = torch.device(device) if device is not None else next(model.parameters()).device
        optimizer = optimizer_of(model.to(where), settings)
        n_steps = steps_of(data, settings)
        return cls(
            model, data, settings, seed, augment, teacher, where, optimizer, max(1, steps_per_epoch), n_steps, objective
        )

    def identity(self) -> str:
        """What must be equal for a snapshot to be this training's."""
        names = [f"{name} {tuple(tensor.shape)}" for name, tensor in self.model.state_dict().items()]
        facts = f"{self.settings} {self.seed} {self.data.digest()} {names}{self.objective.identity}"
        facts += "" if self.settings.ema is None else f" ema {self.settings.ema}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def epoch(self, first_step: int) -> TrainProgress:
        """The steps from `first_step` to the end of its epoch."""
        epoch = first_step // self.steps_per_epoch
        last_step = min(self.n_steps, (epoch + 1) * self.steps_per_epoch)
        self.tally = Tally(self.objective, PATIENCE if self.ahead else 1)
        started = time.perf_counter()
        streaming = nullcontext() if self.capture is None else self.capture.streaming()
        self._graph()
        with _global_rng_seeded(self._stream(2 * epoch), self.device), streaming:
            # One generator per epoch: an epoch is the same whether or not the ones before ran in this process.
            generator = torch.Generator().manual_seed(_mix(self.seed, 2 * epoch + 1))
            order = torch.randperm(len(self.data), generator=generator).split(self.settings.batch_size)
            order = order[: last_step - first_step]
            with closing(self.feed.epoch(order, generator, self.team)) as batches:
                for step, (indices, batch) in enumerate(zip(order, batches, strict=True), first_step):
                    with targets_known(self.known):
                        self._step(step, indices, *batch)
            self._refuse(step, self.tally.look())
        loss, points = self.tally.loss, self.tally.all_points()
        self._refuse_divergence(epoch, loss)
        lr = self.settings.lr_at(last_step - 1, self.n_steps)
        accuracy = self.objective.fraction(points)
        speed = len(points) / (time.perf_counter() - started)
        return TrainProgress(last_step, self.n_steps, epoch + 1, lr, loss / len(points), accuracy, speed)

    def _stream(self, stream: int) -> int:
        """The seed of what a process draws for its share of an epoch: one of its own, the first one's as if alone."""
        return _mix(self.seed, stream + (0 if self.team is None else self.team.rank << 40))

    def _refuse_divergence(self, epoch: int, loss: float) -> None:
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())
        if not (math.isfinite(loss) and finite):
            what = "the weights are no longer finite" if math.isfinite(loss) else f"the loss is {loss}"
            raise DivergedError(f"Training diverged in epoch {epoch + 1}: {what}; lower lr (it is {self.settings.lr}).")

    def _refuse(self, step: int, loss: float | None) -> None:
        if loss is not None:
            self._refuse_divergence(step // self.steps_per_epoch, loss)

    def _step(self, step: int, indices: Tensor, images: Tensor, labels: Tensor) -> None:
        # Channels-last inputs alone make the convolutions a quarter faster on a CPU; the weights keep their layout.
        images = images.to(memory_format=self._layout(images))
        numbers = (self.settings.lr_at(step, self.n_steps), step)
        sharing = self.team if self.team is not None and self.team.divides(len(indices)) else None
        if self.graphed is None:
            dense = partial(self._dense, images, indices, step)
            total, outputs = self._take((images, labels), numbers, dense, sharing)
        else:
            given = [each for each in (self._dense(images, indices, step),) if each is not None]
            total, outputs = self.graphed((images, labels, *given), numbers)
        self._refuse(step, self.tally.add(total, outputs, labels, sharing))

    def _dense(self, images: Tensor, indices: Tensor, step: int | None) -> Tensor | None:
        """What the teacher answers, if the loss asks it."""
        return None if self.taught is None else self.taught(images, indices, self._batch_key(step))

    def _batch_key(self, step: int | None) -> Hashable | None:
        """What tells the batch of a step from all others of any training; None where data or augmentation may know."""
        if step is None or self.taught is None or self.taught.memory is None or not self.feed.is_reproducible:
            return None
        moved = None if self.feed.apart is None else (self.feed.apart.padding, self.feed.apart.flip)
        return self.data.digest(), moved, self.seed, self.settings.batch_size, self.settings.bf16, step

    def _take(
        self,
        tensors: Tensors,
        numbers: tuple[Any, ...],
        dense: Callable[[], Tensor | None] | None = None,
        sharing: Team | None = None,
    ) -> Tensors:
        """One step: loss, gradients, descent, average. The loss () summed over the images, and outputs (B, ...).

        `tensors` are images, targets and, unless `dense` gives them, the teacher's answers if there is one; `numbers`
        are the rate and the number of the step; tensors () on the device, if it may be captured as a graph.
        """
        (images, labels, *given), (lr, step) = tensors, numbers
        self.optimizer.zero_grad()
        with stepping(sharing):
            loss, outputs = self._loss(images, labels, dense or (lambda: given[0] if given else None))
            loss.backward() if self.team is None else self.team.backward(loss)
        descend(self.optimizer, lr)
        if self.average is not None:
            self.average.update(step)
        return loss.detach() * len(labels), outputs

    def _layout(self, images: Tensor) -> torch.memory_format:
        """Channels-last if the network trains so, backward pass included, and the teacher answers."""
        teachers = [] if self.teacher is None else [self.teacher]
        taken = common_layout(teachers, images)
        return taken if taken == CONTIGUOUS else layout_of(self.model, images, training=True)

    def _weight_layout(self) -> torch.memory_format:
        """Of weights while they train: on a GPU, and compiled, that of the images; else contiguous, and left alone."""
        on_gpu = self.ahead and self.device.type == "cuda"
        if not ((on_gpu or self.settings.compile) and self.settings.devices == 1 and self.n_steps):
            return CONTIGUOUS
        with torch.random.fork_rng([]):
            images, _ = self.data.batch(torch.arange(2))
        return self._layout(images.to(self.device))

    def _loss(self, images: Tensor, labels: Tensor, teacher: Callable[[], Tensor | None]) -> tuple[Tensor, Tensor]:
        weight, objective = self.settings.distill_weight, self.objective
        with self._precision():
            answers = self.heads(self.called(images), images)
        dense, outputs = teacher(), answers.main.float()
        loss = objective.mean_loss(outputs, labels, self.settings.label_smoothing)
        for head in answers.auxiliary if self.settings.auxiliary > 0 else ():
            loss = loss + self.settings.auxiliary * objective.mean_loss(head.float(), labels)
        if dense is not None:
            loss = objective.distilled(loss, outputs, dense, labels, weight, self.settings.temperature)
        return loss, outputs.detach()


def _help(facts: tuple[Any, ...], optimizer: dict[str, Any], step: int, unused: bool, team: Team) -> None:
    """What a helper does of one training: the same steps on its share of the images; nothing is written."""
    model, data, settings, seed, augment, teacher = facts
    device = team.fabric.device
    with _thawed(model):
        run = _Run.build(model, data, settings, seed, augment, None if teacher is None else teacher.to(device), device)
        run.optimizer.load_state_dict(optimizer)
        with run.prepared():
            run.help(team, step, unused)


def runs_ahead(device: torch.device) -> bool:
    """Whether a device works while the host goes on, so that nobody should ask it for a number after every step."""
    return device.type == "cuda"


def steps_of(data: LabelledImages, settings: TrainSettings) -> int:
    """How many steps a training takes."""
    return round(settings.epochs * _steps_per_epoch(data, settings))


def _steps_per_epoch(data: LabelledImages, settings: TrainSettings) -> int:
    # Batch normalisation cannot train on one image, so only a ragged last batch of one is dropped.
    return math.ceil(len(data) / settings.batch_size) - (len(data) % settings.batch_size == 1)


class DivergedError(UserError):
    """Training whose loss or weights are no longer finite."""


@torch.no_grad()
def recalibrate_bn(model: nn.Module, data: LabelledImages, n_images: int, seed: int, batch_size: int = 250) -> int:
    """Measure the statistics of every batch normalisation anew on `n_images` random images; returns how many were used.

    Only the running statistics of `model` change (in place): after surgery they still describe the dense network.
    Batches are weighted equally, so a ragged last batch is left out where there is a full one.
    """
    kinds = [
        m for m in nn.Module.modules(model) if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    n_images = min(n_images, len(data))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:n_images]
    batches = [batch for batch in order.split(batch_size) if len(batch) == min(batch_size, n_images)]
    if not kinds or n_images < 2:
        return 0
    device = next(model.parameters()).device
    momenta = [module.momentum for module in kinds]
    with modes_restored(model):
        model.eval()
        for module in kinds:
            module.reset_running_stats()
            module.momentum = None  # a plain average over the batches
            module.train()
        with closing(batches_of(data, batches)) as read:
            for images, _ in read:
                images = images.to(device)
                model(images.to(memory_format=layout_of(model, images)))
    for module, momentum in zip(kinds, momenta, strict=True):
        module.momentum = momentum
    return sum(map(len, batches))


@contextmanager
def _thawed(model: nn.Module) -> Iterator[None]:
    """Every parameter trainable inside where none is; what was frozen is frozen again afterwards."""
    frozen = [] if any(each.requires_grad for each in model.parameters()) else list(model.parameters())
    for parameter in frozen:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None


def _mix(seed: int, stream: int) -> int:
    """A seed of its own for every stream of a run: neighbouring seeds must not share streams."""
    return int.from_bytes(hashlib.sha256(f"{seed} {stream}".encode()).digest()[:7], "big")


@contextmanager
def _global_rng_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from torch's global generator: seed it here, and give it back as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
