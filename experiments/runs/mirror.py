"""A run folder at a URL (s3://, gs://, ...): worked on in a folder here, whose finished files are put there at once.

`files.json`, put last, lists the files that are complete: a run that is killed while one is on its way is resumed from
those before. It also names the process that writes, so that two never mix their files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ...atomic import WATCHERS
from ...errors import Notice, UserError
from ...remote import Store, is_inside
from ...strict_json import parse_json

FILES = "files.json"
CACHE = "KEEPDROP_CACHE"  # the environment variable that moves the folder in which runs are worked on
SHARE = 20  # putting what only saves a resumed run some work takes a twentieth of the time at most
SAVED = (".pt", ".snapshot", ".state")  # written again and again while something is searched or trained
RECORDS = "tensorboard/"


class Mirror:
    """The copy that a process works in, and what of it is already there.

    Args:
        url: of the run's folder.

    Attributes:
        folder: the copy, below `~/.cache/keepdrop` (or `KEEPDROP_CACHE`), removed once all is put.
    """

    def __init__(self, url: str) -> None:
        self.store, self.process, self.token = Store(url), os.getpid(), uuid.uuid4().hex
        self.url, last = self.store.url, PurePosixPath(self.store.root).name or "run"
        self.folder = cache_folder() / "runs" / hashlib.sha256(self.url.encode()).hexdigest()[:16] / last
        self._sent: dict[str, tuple[int, int]] = {}
        self._names: set[str] = set()
        self._lock, self._claimed = threading.RLock(), False
        self._saved, self._cost = time.monotonic(), 0.0

    def empty(self) -> None:
        """Take away what a killed process left in the copy; the caller has locked it."""
        for each in self.folder.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()

    def is_free(self) -> bool:
        """Whether there is nothing at the URL."""
        return not self.store.listing()

    def fetch(self) -> None:
        """Fill the copy from the URL; UserError where a file that was complete is missing."""
        manifest, there = self._manifest(), self.store.listing()
        if manifest is None:  # a folder that was copied there by hand
            names = [name for name in there if is_inside(name) and name not in ("", FILES)]
        else:
            names = list(manifest["files"])
        if missing := [name for name in names if name not in there]:
            raise UserError(
                f"{self.url!r} is not whole: {missing[0]!r}, which the run wrote, is not there; put it back, or begin "
                "a new run."
            )
        self.store.get([name for name in names if not name.startswith(RECORDS)], self.folder)
        self._names = set(names)
        self._sent = {name: stamp for name, stamp, _ in self._files()}

    def claim(self) -> None:
        """Begin to keep the URL up to date; from now on no earlier process may write there."""
        self._list()
        self.sync(everything=True)
        self._claimed = True
        WATCHERS.append(self.changed)

    def changed(self, path: Path) -> None:
        """Told about every file that was written whole."""
        if self.folder in path.parents and not _is_partial(path.relative_to(self.folder)):
            self.update()

    def update(self) -> None:
        """`sync`, once the URL is kept up to date; where it cannot be reached, that is said and tried again."""
        if not self._claimed:
            return
        try:
            self.sync()
        except _TakenError:
            raise
        except UserError as error:  # hours of work are not thrown away for a connection that may come back
            warnings.warn(f"{error} What is finished is in {self.folder}; it is tried again.", Notice, stacklevel=3)

    def sync(self, everything: bool = False) -> None:
        """Put what is new; snapshots and TensorBoard records not every time, unless `everything` is wanted."""
        if os.getpid() != self.process:
            return
        with self._lock:
            files = {name: (stamp, path) for name, stamp, path in self._files()}
            new = [name for name, (stamp, _) in files.items() if self._sent.get(name) != stamp]
            late = [name for name in new if name.endswith(SAVED) or name.startswith(RECORDS)]
            if not everything and time.monotonic() - self._saved < SHARE * self._cost:
                new = [name for name in new if name not in late]
            gone = {name for name in self._names - set(files) if not name.startswith(RECORDS)}
            if not (new or gone):
                return
            self._check_ours()
            # The hashes last, as they are on disk: they never speak of a file that is not there.
            for name in sorted(new, key=lambda name: (name == "hashes.json", name)):
                started = time.monotonic()
                with suppress(FileNotFoundError):  # deleted since
                    self.store.put(files[name][1], name)
                self._sent[name] = files[name][0]
                if name in late:
                    self._saved, self._cost = time.monotonic(), time.monotonic() - started
            known = (self._names | set(new)) - gone
            if known != self._names:
                self._names = known
                self._list()
            self.store.delete(sorted(gone))

    def close(self) -> None:
        """Put the rest and remove the copy, which stays if that fails."""
        if os.getpid() != self.process:
            return
        if self._claimed:
            self._claimed = False
            with suppress(ValueError):
                WATCHERS.remove(self.changed)
            try:
                self.sync(everything=True)
            except _TakenError:
                raise
            except UserError as error:
                # Under a name of its own, so that no later process takes it for what a killed one left.
                kept = self.folder.parent.rename(f"{self.folder.parent}-{self.token[:8]}") / self.folder.name
                raise UserError(
                    f"{error} The run itself lies in {str(kept)!r}: copy that folder to where it belongs, or continue "
                    f"with it as resume={kept}."
                ) from error
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _files(self) -> Iterator[tuple[str, tuple[int, int], Path]]:
        """Every finished file of the copy: its name, what tells a new version from the old one, its path."""
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            with suppress(OSError):  # deleted, or renamed, since
                if not _is_partial(name) and path.is_file():
                    facts = path.stat()
                    yield name.as_posix(), (facts.st_size, facts.st_mtime_ns), path

    def _manifest(self) -> dict[str, Any] | None:
        """What `files.json` says; None without one."""
        content = self.store.read(FILES)
        if content is None:
            return None
        try:
            found = parse_json(content)
            names = found["files"]
            proper = isinstance(names, list) and all(isinstance(name, str) and is_inside(name) for name in names)
        except (ValueError, TypeError, KeyError, RecursionError):
            proper = False
        if not proper:
            raise UserError(f"{self.store.at(FILES)!r} is damaged; delete it if the folder beside it is whole.")
        return dict(found)

    def _list(self) -> None:
        path = self.folder.parent / FILES
        path.write_text(json.dumps({"writer": self.token, "files": sorted(self._names)}, indent=1) + "\n")
        self.store.put(path, FILES)

    def _check_ours(self) -> None:
        found = self._manifest()
        if found is not None and found.get("writer") != self.token:
            raise _TakenError(
                f"Another process has begun to write the run {self.url!r}; this one stops: let one of them end, or "
                "choose another run_dir."
            )


class _TakenError(UserError):
    """Another process writes the same run."""


def _is_partial(name: Path) -> bool:
    """Whether a file is not finished: of a stage, or under the atomic writer's temporary name."""
    return any(part.endswith(".partial") or part.startswith(".partial-") for part in name.parts)


def cache_folder() -> Path:
    """Where keepdrop keeps files between commands: `KEEPDROP_CACHE`, or `~/.cache/keepdrop`."""
    given = os.environ.get(CACHE) or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/keepdrop"
    return Path(given).expanduser()
