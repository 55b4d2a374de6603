"""Guarded training: fine-tuning is kept where the reward split fares no worse; a base that guesses is trained anew."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import safetensors
import safetensors.torch
from torch import Tensor, nn

from ...atomic import write_atomically
from ...envs.data.objective import display_name
from ...envs.data.splits import Splits
from ...envs.evaluation.dense_baseline import GuessingError, measure_baseline
from ...envs.evaluation.mask_evaluator import accuracy_on
from ...envs.networks.copying import copied
from ...envs.networks.modes import evaluating
from ...errors import UserError
from .loop import DivergedError, FitOptions, Progress, TrainProgress, fit_network
from .rate import bearable_rate, lowered, usable_rate
from .train_settings import TrainSettings

LAST, BEST, CUT = "last epoch", "best epoch", "as cut"


@dataclass(frozen=True)
class Judgement:
    """What the reward split said of a fine-tuning; accuracies are fractions.

    Attributes:
        kept: "last epoch", "best epoch" (the last one was worse than the network as cut) or "as cut" (all were).
        before: of the network as cut.
        after: after the last epoch; None if training diverged.
        kept_accuracy: of the network that is kept.
        epoch: the one that is kept; None for "as cut", and for a loop of the user's.
        lr: highest learning rate; None for a loop of the user's.
        lowered: whether it was lowered from `usable_rate` because the network does not bear that.
        other_lr: highest learning rate of the attempt that is not kept, where there were two; else None.
        other_after: after the last epoch of that one; None too if it diverged.
    """

    kept: str
    before: float
    after: float | None
    kept_accuracy: float
    epoch: int | None = None
    lr: float | None = None
    lowered: bool = False
    other_lr: float | None = None
    other_after: float | None = None

    @property
    def ended_better(self) -> bool:
        """Whether the last epoch is better than the network as cut."""
        return self.after is not None and self.after > self.before

    def facts(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self)

    def sentence(self, metric: str | None) -> str | None:
        """What a reader has to know; None where the first attempt's last epoch is kept, at the rate that was set."""
        name = display_name(metric)
        before, kept = (f"{100 * value:.2f} %" for value in (self.before, self.kept_accuracy))
        second_is_kept = self.other_lr is not None and self.lr is not None and self.lr < self.other_lr
        if self.kept == LAST and not second_is_kept:
            rate = f" at a learning rate of {self.lr or 0:g}"
            return f"The network does not bear a higher learning rate: it was fine-tuned{rate}." * self.lowered or None
        attempts = [(self.lr, self.after)]
        if self.other_lr is not None:
            attempts.append((self.other_lr, self.other_after))
        attempts.sort(key=lambda attempt: -(attempt[0] or 0))
        attempted = " and then".join(_ended(*attempt) for attempt in attempts)
        ended = f"Fine-tuning{attempted}, from {before} ({name} on the reward images)"
        if self.kept == CUT:
            return f"{ended}: the network is kept as it was cut."
        which = "" if self.other_lr is None else f" at {self.lr:g}"
        if self.kept == BEST:
            return f"{ended}: epoch {self.epoch}{which} is kept, at {kept}."
        return f"{ended}: the one{which} is kept."


def _ended(lr: float | None, after: float | None) -> str:
    rate = "" if lr is None else f" at a learning rate of {lr:g}"
    return f"{rate} " + ("diverged" if after is None else f"ended at {100 * after:.2f} %")


def fine_tune(
    cut: nn.Module,
    splits: Splits,
    settings: TrainSettings,
    *,
    progress: Progress | None = None,
    snapshot: Path | None = None,
    **options: Unpack[FitOptions],
) -> tuple[nn.Module, Judgement]:
    """A fine-tuned copy of `cut` in evaluation mode, or a copy of `cut` itself, and why; arguments as `fit_network`'s.

    Judged on the reward split before and after every epoch. The last epoch is kept if it is as good as `cut`, else the
    best one that is, else `cut`; so is a training that diverges. Where no rate was given and the last epoch is no
    better than `cut`, there is a second attempt at a tenth of the rate, kept if it is better. With the files of
    `snapshots_of(snapshot)` an interrupted one is resumed.
    """
    rate, before = bearable_rate(cut, splits.fit, settings, **options), accuracy_on(cut, splits.reward)
    if settings.epochs <= 0:
        return copied(cut).eval(), Judgement(LAST, before, before, before, lr=rate)
    was_lowered = rate < usable_rate(splits.fit, settings)

    def attempt(lr: float, file: Path | None) -> tuple[nn.Module, Judgement]:
        return _attempt(cut, splits, replace(settings, lr=lr), before, file, progress=progress, **options)

    model, judged = attempt(rate, snapshot)
    judged = replace(judged, lowered=was_lowered)
    if settings.lr is not None or judged.ended_better or before >= 1 or rate == 0:
        return model, judged
    second, again = attempt(lowered(rate), None if snapshot is None else tenth_file(snapshot))
    if again.kept_accuracy > judged.kept_accuracy:
        return second, replace(again, lowered=was_lowered, other_lr=judged.lr, other_after=judged.after)
    return model, replace(judged, other_lr=again.lr, other_after=again.after)


def _attempt(
    cut: nn.Module,
    splits: Splits,
    chosen: TrainSettings,
    before: float,
    snapshot: Path | None,
    *,
    progress: Progress | None,
    **options: Unpack[FitOptions],
) -> tuple[nn.Module, Judgement]:
    """Train a copy at a given rate, and keep its last epoch, its best one or `cut`, which scores `before`."""
    model, best = copied(cut), _Best(None if snapshot is None else best_file(snapshot))
    last: list[tuple[float, int]] = []

    def judge(record: TrainProgress) -> None:
        last[:] = [(accuracy_on(model, splits.reward), record.epoch)]
        best.offer(model, *last[0], at_least=before)

    try:
        fit_network(model, splits.fit, chosen, **options, progress=progress, snapshot=snapshot, epoch_ends=judge)
        # A training that an interrupted run had finished has no epochs left.
        after, epoch = last[0] if last else (accuracy_on(model, splits.reward), math.ceil(chosen.epochs))
    except DivergedError:
        after, epoch = None, None
    judged = Judgement(LAST, before, after, before if after is None else after, epoch, chosen.lr)
    if after is not None and after >= before:
        return model.eval(), judged
    model = copied(cut).to(next(model.parameters()).device)
    if best.state is None:
        return model.eval(), replace(judged, kept=CUT, kept_accuracy=before, epoch=None)
    model.load_state_dict(best.state)
    return model.eval(), replace(judged, kept=BEST, kept_accuracy=best.accuracy, epoch=best.epoch)


def keep_better(cut: nn.Module, tuned: nn.Module, splits: Splits) -> tuple[nn.Module, Judgement]:
    """The better of a network as cut and after a loop of the user's, on the reward split."""
    before, after = (accuracy_on(model, splits.reward) for model in (cut, tuned))
    if after >= before:
        return tuned, Judgement(LAST, before, after, after)
    return copied(cut).eval(), Judgement(CUT, before, after, before)


@dataclass(frozen=True)
class BaseTraining:
    """The attempts of a training from the beginning: rate, accuracy on the reward split (None: diverged), guessing."""

    attempts: tuple[tuple[float, float | None, bool], ...]

    @property
    def lr(self) -> float:
        """Highest learning rate of the attempt that is kept: the first that does not guess, or else that ended."""
        ended = [attempt for attempt in self.attempts if attempt[1] is not None]
        return next((lr for lr, _, guesses in ended if not guesses), ended[0][0])

    def sentence(self, metric: str | None) -> str | None:
        """What a reader has to know; None where the first attempt answers better than chance."""
        if not self.attempts[0][2]:
            return None
        name = display_name(metric)
        told = " and then".join(_ended(lr, accuracy) for lr, accuracy, _ in self.attempts)
        text = f"Training{told} ({name} on the reward images)"
        if not self.attempts[-1][2]:
            return f"{text}: the first attempt guesses, and the one at {self.lr:g} is kept."
        return f"{text}: the network guesses. More or fewer steps (base.epochs) or another rate (base.lr) may train it."


def train_base(
    model: nn.Module,
    splits: Splits,
    settings: TrainSettings,
    *,
    progress: Progress | None = None,
    snapshot: Path | None = None,
    **options: Unpack[FitOptions],
) -> BaseTraining:
    """Train `model` in place from where it stands; arguments as `fit_network`'s.

    Where no rate was given and the network ends guessing, or diverges, it is trained once more from where it stood at
    a tenth of the rate; the second attempt is kept if it does not guess. With the files of `snapshots_of(snapshot)` an
    interrupted one is resumed.
    """

    def attempt(network: nn.Module, lr: float, file: Path | None) -> tuple[float, float | None, bool]:
        fit_network(network, splits.fit, replace(settings, lr=lr), **options, progress=progress, snapshot=file)
        device = next(network.parameters()).device
        with evaluating(network):
            try:
                return lr, measure_baseline(network, splits, device).accuracy, False
            except GuessingError:
                return lr, accuracy_on(network, splits.reward), True
            except UserError:  # the images do not tell; whoever measures next says so
                return lr, accuracy_on(network, splits.reward), False

    again = settings.lr is None and settings.epochs > 0
    first: tuple[float, float | None, bool] = (settings.rate, None, True)
    begun = copied(model) if again else model
    try:
        first = attempt(model, settings.rate, snapshot)
    except DivergedError:
        if not again:
            raise
    if not (first[2] and again):
        return BaseTraining((first,))
    second = attempt(begun, lowered(settings.rate), None if snapshot is None else tenth_file(snapshot))
    found = BaseTraining((first, second))
    if found.lr == second[0]:
        model.load_state_dict(begun.state_dict())
    return found


def best_file(snapshot: Path) -> Path:
    """Where the best epoch lies, beside the snapshot of a training."""
    return snapshot.with_name(f"{snapshot.stem}-best{snapshot.suffix}")


def tenth_file(snapshot: Path) -> Path:
    """The snapshot of the second attempt, beside that of the first."""
    return snapshot.with_name(f"{snapshot.stem}-tenth{snapshot.suffix}")


def snapshots_of(snapshot: Path) -> tuple[Path, ...]:
    """All files that a fine-tuning with this snapshot may leave."""
    tenth = tenth_file(snapshot)
    return snapshot, best_file(snapshot), tenth, best_file(tenth)


class _Best:
    """The best epoch so far, in memory and, with a file, on disk for a resumed training."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.accuracy, self.epoch = file, -1.0, 0
        self.state: dict[str, Tensor] | None = None
        if file is not None and file.exists():
            self._load(file)

    def offer(self, model: nn.Module, accuracy: float, epoch: int, *, at_least: float) -> None:
        """Keep the model's weights if none were better."""
        if accuracy < at_least or accuracy <= self.accuracy:
            return
        self.accuracy, self.epoch = accuracy, epoch
        # Clones, because training goes on, and because safetensors refuses tensors that share memory.
        self.state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
        if self.file is not None:
            facts = {"judged": json.dumps([accuracy, epoch])}
            write_atomically(self.file, safetensors.torch.save(self.state, metadata=facts))

    def _load(self, file: Path) -> None:
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                self.accuracy, self.epoch = json.loads((opened.metadata() or {})["judged"])
                self.state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:
            raise UserError(f"'{file}' is damaged; delete it and the snapshot beside it.") from error
