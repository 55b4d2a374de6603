"""Files elsewhere: any fsspec URL (`s3://`, `gs://`, `file://`, `memory://`) where a path would do, read and written.

What is read is fetched into a folder of this process; what is written is made whole in a folder here and put then. The
package of a protocol (s3fs, gcsfs, adlfs) is the user's own, and so are addresses and credentials, which fsspec and it
read from the environment and their own files.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from .errors import UserError, first_line, summarised

URL = re.compile(r"(?!hf:)[a-z][a-z0-9+.-]+:(?:/{1,2}\S|/*$)", re.IGNORECASE)
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # the extra of keepdrop that brings a protocol
# One object is put in one step by these; elsewhere a file is written under another name first.
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory")
# Of what such a URL names, a file says where the bytes lie, by templates that are run as code.
REFUSED = ("reference",)
Wanted = Callable[[str], bool]


def is_url(where: str | os.PathLike[str] | None) -> TypeGuard[str | os.PathLike[str]]:
    """Whether a place is an fsspec URL, pathlib's form of one included (one slash after the colon).

    `hf://` is none: keepdrop asks huggingface_hub for those.
    """
    return isinstance(where, str | os.PathLike) and URL.match(os.fspath(where)) is not None


class Store:
    """A folder or file behind a URL.

    Raises:
        UserError: the protocol is unknown, its package is missing, it cannot be set up, or one file system would be
            read through another (`zip://a::s3://b`).
    """

    def __init__(self, where: str | os.PathLike[str]) -> None:
        import fsspec  # here, so that a process that reads and writes paths alone does without it

        url = os.fspath(where)
        protocol, _, rest = url.partition(":")
        self.protocol = protocol.lower()
        if "::" in url or self.protocol in REFUSED:
            raise UserError(
                f"{url!r} leads through one file system to another; expected a single one, such as s3://BUCKET/NAME: "
                "unpack or copy what lies there first."
            )
        if not rest.strip("/"):
            raise UserError(f"{url!r} names no place; expected one, such as {protocol}://BUCKET/NAME.")
        if ".." in rest.split("/"):  # an object store takes it for a name like any other, a disk does not
            raise UserError(f"{url!r} goes up by '..'; write the URL of the place itself.")
        # Hydra, the shell and pathlib make one slash of two.
        self.url = f"{self.protocol}://{rest.lstrip('/') if self.protocol != 'file' else '/' + rest.lstrip('/')}"
        self.url = self.url.rstrip("/")
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            extra = EXTRAS.get(self.protocol)
            install = f"run pip install 'keepdrop[{extra}]'" if extra else f"install it ({first_line(error)})"
            raise UserError(f"{url!r} needs a package that is not installed; {install}, or give a folder.") from error
        except Exception as error:  # every file system has its own
            known = ", ".join(f"{each}://" for each in ("s3", "gs", "file", "memory"))
            raise UserError(
                f"{url!r} cannot be opened ({summarised(error)}); expected a folder, or a URL that fsspec knows, such "
                f"as {known}."
            ) from error
        self.root = self.root.rstrip("/")

    def at(self, name: str) -> str:
        """The path of a file in the folder, as the file system takes it; of the URL itself for ""."""
        return f"{self.root}/{name}" if name else self.root

    def listing(self) -> dict[str, Any]:
        """What lies in the folder: names below it, each with what the file system says of it; {"": ...} of a file."""
        with self.said("read"):
            self.system.invalidate_cache()
            try:
                found = self.system.find(self.root, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        start = self.root.lstrip("/")
        names = {path.lstrip("/").removeprefix(start).lstrip("/"): facts for path, facts in found.items()}
        return {name: facts for name, facts in names.items() if not name.endswith("/")}

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none."""
        with self.said("read"):
            try:
                return bytes(self.system.cat_file(self.at(name)))
            except FileNotFoundError:
                return None

    def get(self, names: list[str], folder: Path) -> None:
        """Fetch files into a folder; UserError for one that is not there."""
        pairs = [(self.at(name), folder / (name or Path(self.root).name)) for name in names]
        for _, path in pairs:
            path.parent.mkdir(parents=True, exist_ok=True)
        with self.said("read"):
            if pairs:
                self.system.get([each for each, _ in pairs], [str(path) for _, path in pairs])

    def put(self, path: Path, name: str) -> None:
        """Write a file, whole or not at all as far as the store allows; `name` "" for a URL that is a file."""
        target = self.at(name)
        with self.said("written"):
            if self.protocol in OBJECT_STORES:
                self.system.put_file(str(path), target)
                return
            parent, _, last = target.rpartition("/")
            self.system.makedirs(parent, exist_ok=True)
            self.system.put_file(str(path), f"{parent}/.partial-{last}")
            self.system.mv(f"{parent}/.partial-{last}", target)

    def delete(self, names: list[str]) -> None:
        """Remove files; one that is gone already does not count."""
        with self.said("written"):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self.system.rm_file(self.at(name))

    @contextlib.contextmanager
    def said(self, done: str) -> Iterator[None]:
        """Turn whatever a file system raises inside into one sentence: `done` is "read" or "written"."""
        try:
            yield
        except UserError:
            raise
        except PermissionError as error:
            raise UserError(
                f"{self.url!r} may not be {done} ({summarised(error)}); check the "
                "credentials of this machine and what they allow."
            ) from error
        except FileNotFoundError as error:
            raise UserError(
                f"{self.url!r} cannot be {done}: it, or its bucket, is not there "
                f"({summarised(error)}); check the name, or make the bucket first."
            ) from error
        except Exception as error:  # of the client, its transport, its credentials
            raise UserError(
                f"{self.url!r} cannot be {done} ({summarised(error)}); check the "
                "address, the connection and the credentials of this machine."
            ) from error


@cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    """Where this process keeps what it fetched; removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="keepdrop-")


# By URL and the files fetched: what the store said of them, and where they lie.
_fetched: dict[tuple[str, tuple[str, ...]], tuple[str, Path]] = {}


def local(where: str | os.PathLike[str], wanted: Wanted | None = None) -> Path:
    """A path as it is; of a URL a copy of the file or folder, fetched anew only where the store has another one.

    Args:
        where: a path or an fsspec URL.
        wanted: which files of a folder are fetched, by their names below it; None: all.

    Raises:
        UserError: there is nothing, or it cannot be read.
    """
    if not is_url(where):
        return Path(where)
    store = Store(where)
    found = _copied(store, wanted)
    if found is None:
        raise UserError(f"There is nothing at {store.url!r} that keepdrop reads; check the name.")
    return found


def local_if_there(where: str | os.PathLike[str]) -> Path | None:
    """`local` of a file; None where there is none."""
    if is_url(where):
        return _copied(Store(where), None)
    return path if (path := Path(where)).is_file() else None


def _copied(store: Store, wanted: Wanted | None) -> Path | None:
    listing = store.listing()
    names = sorted(name for name in listing if is_inside(name) and (wanted is None or name == "" or wanted(name)))
    if not names:
        return None
    key, there = (store.url, tuple(names)), repr([listing[name] for name in names])
    if key in _fetched and _fetched[key][0] == there:
        return _fetched[key][1]
    folder = Path(tempfile.mkdtemp(dir=_kept().name))
    last = PurePosixPath(store.root).name or "root"
    place = folder / last
    store.get(names, folder if names == [""] else place)
    _fetched[key] = (there, place)
    return place


def is_inside(name: str) -> bool:
    """Whether a name that a store gave stays below its folder."""
    parts = name.split("/")
    return not name.startswith("/") and ".." not in parts and "\\" not in name


@contextlib.contextmanager
def writing(where: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into: the path itself; of a URL one whose files are put there when the body ends.

    Raises:
        UserError: what was written cannot be put.
    """
    if not is_url(where):
        yield Path(where)
        return
    store = Store(where)
    with tempfile.TemporaryDirectory(prefix="keepdrop-") as folder, named(Path(folder), store.url):
        yield Path(folder)
        for path in sorted(each for each in Path(folder).rglob("*") if each.is_file()):
            store.put(path, path.relative_to(folder).as_posix())


@contextlib.contextmanager
def named(path: Path, where: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, whatever is said of a local copy (a `UserError`, what Ctrl-C says) names the place it is a copy of."""
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        if str(path) != str(where):
            error.args = tuple(
                each.replace(str(path), str(where)) if isinstance(each, str) else each for each in error.args
            )
            if isinstance(error, UserError):
                error.typed = error.typed.replace(str(path), str(where))
        raise
