"""The folder of a run from Python: what it was asked to do, so that only the same call goes on with it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...envs.networks.checkpoint import hash_state
from ...envs.task import PruningTask
from ...errors import UserError
from ..runs.folder import RunFolder
from ..training.train_settings import TrainSettings

ASKED = "asked.json"


def open_folder(where: str | Path, task: PruningTask, asked: Mapping[str, Any]) -> RunFolder:
    """A new folder, or that of an interrupted call with the same network, images and arguments; else a UserError.

    It is locked until it is closed, and what an earlier call left there is as that call wrote it. One at a URL is
    fetched first, and kept up to date.
    """
    folder = RunFolder.at(where)
    path = folder.path
    asked = {"base": hash_state(task.model), "splits": task.splits.summary(), **asked}
    if not (path / ASKED).is_file():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            folder.close()
            raise UserError(
                f"The folder {folder.place!r} exists and is not empty; expected a new one, or that of this run."
            )
        folder.keep_hashes()
    folder.lock()
    try:
        with folder.naming():
            _check_asked(folder, asked)
        folder.publish()
    except BaseException:
        folder.close()
        raise
    return folder


def _check_asked(folder: RunFolder, asked: Mapping[str, Any]) -> None:
    """Write down what a new run was asked to do; a UserError for an earlier one that was asked something else."""
    folder.check_hashes()
    before = folder.read_json(ASKED)
    if before is None:
        folder.write_json(ASKED, described(dict(asked)))
        return
    now = described(dict(asked), before)
    if before != now:
        raise UserError(
            f"{folder.place!r} holds another run: its {_odd(before, now)} differs; give a new folder, or the "
            "arguments it began with."
        )


def described(value: Any, before: Any = None) -> Any:
    """A value as JSON: settings by field, functions by name.

    Args:
        before: what an earlier version wrote in its place. Fields that it did not know are left out while they have
            their defaults, and a training without a rate of its own is one at the rate that was the default then.
    """
    known = before if isinstance(before, Mapping) else {}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, TrainSettings) and known and "top_lr" not in known:
            value = dataclasses.replace(value, lr=value.rate)
        fields = [each for each in dataclasses.fields(value) if not known or each.name in known or _is_set(value, each)]
        # Of a training, how many devices share it is nobody's business: another machine may have more or fewer.
        fields = [each for each in fields if not (isinstance(value, TrainSettings) and each.name == "devices")]
        called = {each.name: described(getattr(value, each.name), known.get(each.name)) for each in fields}
        return {"": type(value).__qualname__} | called
    if isinstance(value, functools.partial):
        return {"": described(value.func), **described(value.keywords, before)}
    if isinstance(value, Mapping):
        return {str(key): described(each, known.get(str(key))) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _odd(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs first, with the field of settings that does: `settings.evaluation.target`."""
    name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
    ours, theirs = before.get(name), now.get(name)
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping) and "" in ours and ours[""] == theirs.get(""):
        return f"{name}.{_odd(ours, theirs)}"
    return name


def _is_set(value: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether a field of a dataclass has another value than its default."""
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return bool(getattr(value, field.name) != made)
