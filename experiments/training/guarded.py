"""Guarded fine-tuning: the tuned network is kept only where the reward split does not fare worse than as cut."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ...atomic import write_atomically
from ...envs.data.objective import display_name
from ...envs.data.splits import Splits
from ...envs.evaluation.mask_evaluator import accuracy_on
from ...envs.networks.copying import copied
from ...errors import UserError
from .augment import Augment
from .loop import DivergedError, Progress, TrainProgress, fit_network
from .rate import bearable_rate
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
        lowered: whether it was lowered from `top_lr` because the network does not bear that.
    """

    kept: str
    before: float
    after: float | None
    kept_accuracy: float
    epoch: int | None = None
    lr: float | None = None
    lowered: bool = False

    def facts(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self)

    def sentence(self, metric: str | None) -> str | None:
        """What a reader has to know; None where the last epoch is kept at the rate that was set."""
        name, rate = display_name(metric), "" if self.lr is None else f" at a learning rate of {self.lr:g}"
        before, kept = (f"{100 * value:.2f} %" for value in (self.before, self.kept_accuracy))
        if self.kept == LAST:
            return f"The network does not bear a higher learning rate: it was fine-tuned{rate}." * self.lowered or None
        after = "diverged" if self.after is None else f"ended at {100 * self.after:.2f} %"
        ended = f"Fine-tuning{rate} {after}, from {before} ({name} on the reward images)"
        if self.kept == BEST:
            return f"{ended}: epoch {self.epoch} is kept, at {kept}."
        return f"{ended}: the network is kept as it was cut."


def fine_tune(
    cut: nn.Module,
    splits: Splits,
    settings: TrainSettings,
    *,
    seed: int,
    augment: Augment | None = None,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
    snapshot: Path | None = None,
    device: torch.device | str | None = None,
) -> tuple[nn.Module, Judgement]:
    """A fine-tuned copy of `cut` in evaluation mode, or a copy of `cut` itself, and why; arguments as `fit_network`'s.

    Judged on the reward split before and after every epoch. The last epoch is kept if it is as good as `cut`, else the
    best one that is, else `cut`; so is a training that diverges. Beside `snapshot` the best epoch so far has a file.
    """
    rate = bearable_rate(cut, splits.fit, settings, seed=seed, augment=augment, teacher=teacher, device=device)
    chosen, before = replace(settings, lr=rate), accuracy_on(cut, splits.reward)
    if settings.epochs <= 0:
        return copied(cut).eval(), Judgement(LAST, before, before, before, lr=rate)
    model, best = copied(cut), _Best(None if snapshot is None else best_file(snapshot))
    last: list[tuple[float, int]] = []

    def judge(record: TrainProgress) -> None:
        last[:] = [(accuracy_on(model, splits.reward), record.epoch)]
        best.offer(model, *last[0], at_least=before)

    try:
        fit_network(
            model,
            splits.fit,
            chosen,
            seed=seed,
            augment=augment,
            teacher=teacher,
            progress=progress,
            snapshot=snapshot,
            device=device,
            epoch_ends=judge,
        )
        after, epoch = last[0] if last else (accuracy_on(model, splits.reward), None)
    except DivergedError:
        after, epoch = None, None
    judged = Judgement(LAST, before, after, before if after is None else after, epoch, rate, rate < settings.rate)
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


def best_file(snapshot: Path) -> Path:
    """Where the best epoch lies, beside the snapshot of a training."""
    return snapshot.with_name(f"{snapshot.stem}-best{snapshot.suffix}")


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
