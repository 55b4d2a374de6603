"""Atomic writes: a file is the old one or the new one, never part of either. Every room writes through these."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import UserError

WATCHERS: list[Callable[[Path], None]] = []
"""Told about every file that was written whole: copies of a run's folder elsewhere are kept up to date by that."""


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace a file in one step; on any failure, a full disk included, the old one stays.

    Args:
        path: its folder is made if missing.
        content: text is written as UTF-8.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the body ends; it is removed when the body fails.

    For libraries that write a file by themselves. The temporary name is fixed, so that what a killed writer left behind
    is overwritten by the next one, and it keeps the suffix, which some libraries go by.
    """
    temporary = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(
                f"Could not write {str(path)!r} ({error.strerror or error}); what was there before is intact: free "
                "some space or choose another folder, then",
                python="call again: with the same folder= a run continues where it was.",
                typed="continue (a run: with resume=RUN).",
            ) from error
        raise
    for tell in tuple(WATCHERS):
        tell(path)
