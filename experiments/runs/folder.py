"""A run's folder: what it holds, how it is opened, resumed and never left half-written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...atomic import write_atomically
from ...envs.files.renamed import current_config
from ...errors import UserError, first_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG = "config.yaml"
FACTS = "facts.json"
METRICS = "metrics.json"


class RunFolder:
    """One run's folder.

    Layout: `config.yaml` (resolved), `facts.json` (command, versions, seed, splits), `base/`, `layers/NN-name/` (agent,
    decision, network), `finetune/`, `pruned/`, `tensorboard/`, `curves.json`, `metrics.json`, `report.md` and
    `report.html`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: DictConfig) -> RunFolder:
        """Open a new folder and write its configuration; a folder that holds something is refused."""
        from omegaconf import OmegaConf  # here, so that the Python interface does without it

        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"The run folder {str(path)!r} exists and is not empty; expected a new one: choose another run_dir, or "
                f"continue that run with resume={path}."
            )
        made = [parent for parent in (path, *path.parents) if not parent.exists()]
        folder = cls(path)
        try:
            with _disk_errors(path):
                path.mkdir(parents=True, exist_ok=True)
            folder.write_text(CONFIG, OmegaConf.to_yaml(config, resolve=True))
        except UserError:
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of an earlier run."""
        if not (path / CONFIG).is_file():
            raise UserError(
                f"{str(path)!r} is not a keepdrop run folder ({CONFIG} is missing); expected the folder of an earlier "
                "run: look under runs/."
            )
        return cls(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def config(self) -> DictConfig:
        """The resolved configuration the run began with, under today's names."""
        from omegaconf import DictConfig, OmegaConf
        from yaml import YAMLError  # type: ignore[import-untyped]

        try:
            loaded = OmegaConf.load(self.path / CONFIG)
            current = OmegaConf.create(current_config(OmegaConf.to_container(loaded)))
        except (YAMLError, OSError, ValueError) as error:
            raise UserError(
                f"The {CONFIG} of {str(self.path)!r} cannot be read ({first_line(error)}); put back the one that the "
                "run wrote."
            ) from error
        if not isinstance(current, DictConfig):
            raise UserError(
                f"The {CONFIG} of {str(self.path)!r} holds no settings; put back the one that the run wrote."
            )
        return current

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all; the old one survives a full disk."""
        write_atomically(self.path / name, text)

    def write_json(self, name: str, content: Any) -> None:
        """`write_text` of indented JSON."""
        self.write_text(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Parsed JSON, or None where the file is not there yet."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

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
            # Whoever writes a stage again (a run stopped between its last two files) has the newer one.
            shutil.rmtree(final, ignore_errors=True)
            working.replace(final)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise
        raise UserError(
            f"Could not write {str(target)!r} ({error.strerror}); what was there before is intact: free some space or "
            "choose another run_dir, then continue with resume=."
        ) from error
