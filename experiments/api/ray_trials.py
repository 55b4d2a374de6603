"""Ray Tune: `prune` as a trainable, its arguments as a search space, resumed from the checkpoints of its trials."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import UserError
from ..engines.ray_cluster import import_ray
from .progress import Progress
from .prune_and_apply import prune
from .settings import FINETUNE, Settings

RUN = "run"  # the folder of `prune` below a trial's
SECTIONS = {"finetune": FINETUNE, "settings": Settings()}


def trainable(model: nn.Module, train: Any, test: Any, *, every: int = 10, batch_size: int = 64, **fixed: Any) -> Any:
    """`keepdrop.prune` for `ray.tune.Tuner`: every trial prunes as its configuration says, and reports what came of it.

    A configuration, and so the search space, has arguments of `prune` as keys (macs_removed, drop_bound, layers, seed,
    ...), and settings by dotted name: "finetune.epochs", "settings.network.masks". Reported at the end are accuracy,
    base_accuracy, macs, macs_fraction, params_fraction, milliseconds and base_milliseconds (of a pass on the trial's
    machine; trials that share one disturb it). A trial that fails, or is restored, goes on from its last checkpoint;
    until it has pruned it reports `accuracy` and all other figures as nan, and `steps`, how many were made.

    Args:
        model, train, test: as for `prune`; sent once to each node.
        every: steps (updates, epochs) from one checkpoint to the next.
        batch_size: images of a pass that is timed; 0 times none.
        fixed: arguments of `prune` that all trials share.

    Raises:
        UserError: Ray is not installed, or an argument is none of `prune`.
    """
    import_ray("keepdrop.experiments.api.ray_trials")
    from ray import tune

    arguments_of({}, fixed)
    one = partial(_trial, every=every, batch_size=batch_size, fixed=fixed)
    one.__name__ = "prune"  # type: ignore[attr-defined]  # of the trials' folders
    return tune.with_parameters(one, model=model, train=train, test=test)


def arguments_of(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `prune` from a configuration with dotted settings; UserError for a key that is none."""
    found, own = dict(fixed), ("model", "train", "test", "folder")
    known = [name for name in inspect.signature(prune).parameters if name not in own]
    for key in fixed:
        _check_key(key, key in known, known)
    for key, value in config.items():
        head, dot, rest = key.partition(".")
        _check_key(key, head in (SECTIONS if dot else known), known)
        found[head] = _replaced(found.get(head) or SECTIONS[head], rest, value, key) if dot else value
    return found


def _check_key(key: str, fits: bool, known: list[str]) -> None:
    if not fits:
        raise UserError(
            f"{key!r} is no setting of a trial; expected an argument of keepdrop.prune ({', '.join(known)}), or one of "
            "its settings as in 'finetune.epochs' and 'settings.network.masks'."
        )


def _replaced(section: Any, path: str, value: Any, key: str) -> Any:
    """A settings object with the field at a dotted path replaced."""
    name, dot, rest = path.partition(".")
    fields = {each.name for each in dataclasses.fields(section)} if dataclasses.is_dataclass(section) else set()
    if name not in fields:
        raise UserError(f"{key!r} names no setting: {type(section).__name__} has {', '.join(sorted(fields))}.")
    return dataclasses.replace(section, **{name: _replaced(getattr(section, name), rest, value, key) if dot else value})


def _trial(
    config: Mapping[str, Any],
    model: nn.Module,
    train: Any,
    test: Any,
    every: int,
    batch_size: int,
    fixed: Mapping[str, Any],
) -> None:
    from ray import tune

    folder = Path(tune.get_context().get_trial_dir()) / RUN
    before = tune.get_checkpoint()
    if before is not None and not folder.exists():
        before.to_directory(str(folder))
    chosen = arguments_of(config, fixed)
    reporter = _Reporter(folder, every, chosen.pop("progress", None))
    result = prune(model, train, test, **chosen, folder=folder, progress=reporter)
    figures = {
        "accuracy": result.accuracy,
        "base_accuracy": result.base_accuracy,
        "macs": float(result.macs),
        "macs_fraction": result.macs / result.base_macs,
        "params_fraction": result.params / result.base_params,
    }
    if batch_size:
        for timed in result.latency([batch_size]):
            name = "milliseconds" if timed.model == "pruned" else "base_milliseconds"
            figures[name] = 1000 * timed.median_seconds
    reporter.report(figures)


class _Reporter:
    """Reports a checkpoint, the folder of the run so far, every few steps."""

    def __init__(self, folder: Path, every: int, also: Callable[[Progress], None] | None) -> None:
        self.folder, self.every, self.also, self.steps = folder, every, also, 0

    def __call__(self, step: Progress) -> None:
        self.steps += 1
        if self.also is not None:
            self.also(step)
        if self.steps % self.every == 0:
            self.report({"accuracy": float("nan")})

    def report(self, figures: Mapping[str, float]) -> None:
        from ray import tune

        unknown = ("accuracy", "macs_fraction", "milliseconds")
        known = {name: float("nan") for name in unknown} | dict(figures)
        tune.report(known | {"steps": self.steps}, checkpoint=tune.Checkpoint.from_directory(str(self.folder)))
