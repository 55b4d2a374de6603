"""A run's folder: what it holds, how it is opened, resumed, locked, checked by hashes and never left half-written.

One at a URL is worked on in a copy here (`mirror`).
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...atomic import write_atomically
from ...envs.files.renamed import current_config
from ...errors import UserError, first_line
from ...remote import is_url, named
from ...strict_json import parse_json
from .mirror import Mirror

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are the user's affair
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG = "config.yaml"
FACTS = "facts.json"
METRICS = "metrics.json"
HASHES = "hashes.json"
FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
IMPOSSIBLE = (errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
DEEPEST = 100  # levels of a configuration; those of a run have a handful
LARGEST_INTEGER = 2**63  # of a JSON file of ours; more is damage, and floats do not hold it


class RunFolder:
    """One run's folder.

    Layout: `config.yaml` (resolved), `facts.json` (command, versions, seed, splits), `base/`, `layers/NN-name/` (agent,
    decision, network), `finetune/`, `pruned/`, `tensorboard/`, `curves.json`, `metrics.json`, `report.md` and
    `report.html`; `hashes.json` holds the sha256 of what a resumed run reads (not in runs of version 0.1.0).

    Args:
        path: of the folder; of one at a URL that of the copy here.
        root: the run's folder, where `path` is a part of it: the hashes are kept there.
        mirror: keeps the URL up to date.
    """

    def __init__(self, path: Path, root: Path | None = None, mirror: Mirror | None = None) -> None:
        self.path, self.root, self.mirror = path, root or path, mirror
        self._lock: int | None = None

    @classmethod
    def create(cls, where: str | Path, config: DictConfig, numbered: bool = False) -> RunFolder:
        """Make and lock a new folder and write its configuration; one that holds something is refused.

        `numbered` takes `PATH-2`, `PATH-3`, ... instead where `path` is taken, and writes that into `config.run_dir`.
        """
        from omegaconf import OmegaConf  # here, so that the Python interface does without it

        made: list[Path] = []
        if is_url(where):
            folder = cls._copied(str(where))
        else:
            path = Path(where)
            with _disk_errors(path):
                made = [parent for parent in (path, *path.parents) if not parent.exists()]
                path = first_free(path) if numbered else path
                if path.exists() and not path.is_dir():
                    raise UserError(f"The run folder {str(path)!r} exists and is no folder; choose another run_dir.")
                path.mkdir(parents=True, exist_ok=True)
            folder = cls(path)
        try:
            folder.lock()
            if any(folder.path.iterdir()) or (folder.mirror is not None and not folder.mirror.is_free()):
                raise UserError(
                    f"The run folder {folder.place!r} exists and is not empty; expected a new one: choose another "
                    f"run_dir, or continue that run with resume={folder.place}."
                )
            if numbered and folder.mirror is None:
                OmegaConf.update(config, "run_dir", str(folder.path))
            folder.write_text(CONFIG, OmegaConf.to_yaml(config, resolve=True))
            folder.keep_hashes([CONFIG])
            folder.publish()
        except BaseException:
            folder.close()
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise
        return folder

    @classmethod
    def open(cls, where: str | Path) -> RunFolder:
        """Open the folder of an earlier run; one at a URL is locked and fetched."""
        folder = cls.at(where)
        if not (folder / CONFIG).is_file():
            folder.close()
            raise UserError(
                f"{folder.place!r} is not a keepdrop run folder ({CONFIG} is missing); expected the folder of an "
                "earlier run: look under runs/."
            )
        return folder

    @classmethod
    def at(cls, where: str | Path) -> RunFolder:
        """A folder, whatever it holds; one at a URL is locked and fetched, and kept up to date from `publish` on."""
        if not is_url(where):
            return cls(Path(where))
        folder = cls._copied(str(where))
        try:
            assert folder.mirror is not None
            folder.mirror.fetch()
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def _copied(cls, url: str) -> RunFolder:
        """An empty copy here of a folder at a URL, locked."""
        mirror = Mirror(url)
        with _disk_errors(mirror.folder):
            mirror.folder.mkdir(parents=True, exist_ok=True)
        folder = cls(mirror.folder, mirror=mirror)
        with folder.naming():
            folder.lock()
        mirror.empty()
        return folder

    @property
    def place(self) -> str:
        """What a person calls the folder: its path, or its URL."""
        return str(self.path) if self.mirror is None else self.mirror.url

    def naming(self) -> AbstractContextManager[None]:
        """Inside, what is said of the copy of a folder at a URL names the URL."""
        return named(self.path, self.place)

    def publish(self) -> None:
        """Begin to keep the URL of a folder up to date; nothing where it has none."""
        if self.mirror is not None:
            self.mirror.claim()

    def sync(self) -> None:
        """Put what other processes wrote to the folder's URL, if it has one."""
        if self.mirror is not None:
            self.mirror.update()

    def part(self, name: str) -> RunFolder:
        """A folder below, which belongs to the same run."""
        return RunFolder(self.path / name, self.root, self.mirror)

    def lock(self) -> None:
        """Keep other processes from working in this folder until `close`, or until this process ends, however it does.

        A `UserError` where another one does. Reading (`report`, `apply`) needs no lock.
        """
        if fcntl is None or self._lock is not None:
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"Another process is working in {str(self.path)!r}; wait until it ends, or choose another run_dir."
                ) from None
            return  # a file system that knows no locks
        self._lock = handle

    def close(self) -> None:
        """Give the lock back; the last files of a folder at a URL are put there first."""
        try:
            if self.mirror is not None:
                self.mirror.close()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def config(self) -> DictConfig:
        """The resolved configuration the run began with, under today's names."""
        from omegaconf import OmegaConf

        return OmegaConf.create(current_config(read_config(self.path / CONFIG)))

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all; the old one survives a full disk."""
        write_atomically(self.path / name, text)

    def write_json(self, name: str, content: Any) -> None:
        """`write_text` of indented JSON, and its hash."""
        text, path = json.dumps(content, indent=2, allow_nan=False) + "\n", self.path / name
        if path.is_file():
            self.forget_hash(name)  # so that a run killed before the new one is noted is not refused
        self.write_text(name, text)
        self.note_hashes({path: path})

    def read_json(self, name: str) -> Any:
        """A parsed JSON object, or None where the file is not there yet; a damaged one is a `UserError`."""
        path = self.path / name
        return read_json(path) if path.is_file() else None

    def keep_hashes(self, names: Iterable[str] = ()) -> None:
        """Begin to keep hashes, of these files first."""
        self.write_text(HASHES, "{}\n")
        self.note_hashes({self.path / name: self.path / name for name in names})

    def forget_hash(self, name: str) -> None:
        """Before a file is deleted or written anew."""
        self.note_hashes({self.path / name: None})

    def note_hashes(self, files: Mapping[Path, Path | None]) -> None:
        """Note the sha256 of files, by the path they will be at; None forgets it. Nothing where a run keeps none."""
        if not (self.root / HASHES).is_file():
            return
        new = {
            path.relative_to(self.root).as_posix(): None if now is None else sha256_of(now)
            for path, now in files.items()
        }
        with _one_at_a_time(self.root / CONFIG):
            known = {**read_json(self.root / HASHES), **new}
            kept = {name: each for name, each in known.items() if each is not None}
            write_atomically(self.root / HASHES, json.dumps(kept, indent=1) + "\n")

    def check_hashes(self) -> None:
        """Raise a `UserError` that names the first file which is not as the run wrote it; missing files do not count.

        The hashes tell damage and changes by hand, not an attack: who can write the files can write the hashes.
        """
        path = self.root / HASHES
        for name, expected in (read_json(path) if path.is_file() else {}).items():
            file = self.root / name
            if not isinstance(expected, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{str(path)!r} is damaged; put back the one that the run wrote.")
            if file.is_file() and sha256_of(file) != expected:
                raise UserError(
                    f"{str(file)!r} is not as the run wrote it (its sha256 differs from that in {HASHES}); put the old "
                    f"file back, or begin a new run{' with other settings typed' if name == CONFIG else ''}."
                )

    @contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        """A folder that appears under its name only once everything in it is written.

        Yields the working folder; an interrupted stage leaves `name.partial`, which the next attempt clears.
        """
        final, working = self.path / name, self.path / (name + ".partial")
        with _disk_errors(final):
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir(parents=True)
            yield working
            files = [each for each in working.rglob("*") if each.is_file()]
            # Whoever writes a stage again (a run stopped between its last two files) has the newer one.
            shutil.rmtree(final, ignore_errors=True)
            # First the hashes: a run that is killed in between does the stage anew, and notes them anew.
            self.note_hashes({final / each.relative_to(working): each for each in files})
            working.replace(final)
        self.sync()


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in FORBIDDEN + IMPOSSIBLE:
            raise
        raise UserError(
            f"Could not write {str(target)!r} ({error.strerror}); what was there before is intact: free some space or "
            "choose another run_dir, then continue with resume=."
        ) from error


def read_json(path: Path, kind: type = dict, called: str = "an object") -> Any:
    """The content of a JSON file that a run wrote; `UserError` for what is no JSON, no `kind`, or not finite."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"), LARGEST_INTEGER)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(
            f"{str(path)!r} is damaged ({first_line(error)[:100]}); put back the file that the run wrote, or run the "
            "command anew."
        ) from error
    if not isinstance(content, kind):
        raise UserError(
            f"{str(path)!r} is damaged (it holds a {type(content).__name__}, expected {called}); put back the file "
            "that the run wrote, or run the command anew."
        )
    return content


def read_config(path: Path) -> dict[str, Any]:
    """A `config.yaml` as plain containers, interpolations as they stand; `UserError` for anything else."""
    import yaml  # type: ignore[import-untyped]
    from omegaconf import OmegaConf

    try:
        text = path.read_text(encoding="utf-8")
        # Some hundred bytes of nested aliases unfold to gigabytes, and deep nesting takes minutes; runs write neither.
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                raise ValueError(f"it holds an alias, or is nested more than {DEEPEST} deep")
        content = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # YAML and OmegaConf have their own zoo of errors
        raise UserError(
            f"The {CONFIG} of {str(path.parent)!r} cannot be read ({first_line(error)[:100]}); put back the one that "
            "the run wrote."
        ) from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"The {CONFIG} of {str(path.parent)!r} holds no settings; put back the one that the run wrote.")
    return {str(key): value for key, value in content.items()}


def file_name(name: str) -> str:
    """A layer's name as that of a file, in which `/` and the like have no place; different for different names."""
    if re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII) and set(name) != {"."}:
        return name
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_free(path: Path) -> Path:
    """The path itself, made, or the first of `PATH-2`, ... that nobody has made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        each = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            each.mkdir()
            return each
    raise AssertionError("unreachable")


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for other processes inside, by a lock on a file that stays; the processes of a comparison share a run."""
    if fcntl is None or not path.is_file():
        yield
        return
    with path.open("rb") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
