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

ASKED = "asked.json"


def open_folder(path: Path, task: PruningTask, asked: Mapping[str, Any]) -> RunFolder:
    """A new folder, or that of an interrupted call with the same network, images and arguments; else a UserError.

    It is locked until it is closed, and what an earlier call left there is as that call wrote it.
    """
    folder = RunFolder(path)
    now = {"base": hash_state(task.model), "splits": task.splits.summary(), **described(dict(asked))}
    if not (path / ASKED).is_file():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"The folder {str(path)!r} exists and is not empty; expected a new one, or that of this run."
            )
        folder.keep_hashes()
    folder.lock()
    try:
        _check_asked(folder, now)
    except BaseException:
        folder.close()
        raise
    return folder


def _check_asked(folder: RunFolder, now: Mapping[str, Any]) -> None:
    """Write down what a new run was asked to do; a UserError for an earlier one that was asked something else."""
    folder.check_hashes()
    before = folder.read_json(ASKED)
    if before is None:
        folder.write_json(ASKED, now)
    elif before != now:
        odd = next(name for name in {**before, **now} if before.get(name) != now.get(name))
        raise UserError(
            f"{str(folder.path)!r} holds another run: its {odd} differs; give a new folder, or the arguments it began "
            "with."
        )


def described(value: Any) -> Any:
    """A value as JSON: settings by field, functions by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: described(getattr(value, each.name)) for each in dataclasses.fields(value)}
        return {"": type(value).__qualname__} | fields
    if isinstance(value, functools.partial):
        return {"": described(value.func), **described(value.keywords)}
    if isinstance(value, Mapping):
        return {str(key): described(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
