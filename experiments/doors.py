"""What every command's door does: compose, check, run, and answer Ctrl-C with the way to go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..rewards.errors import UserError
from .run_folder import CONFIG, RunFolder
from .schema import register_schemas, structured

SettingsT = TypeVar("SettingsT")

CONF = "pkg://keepdrop.conf"


def hydra_door(name: str, run: Callable[[DictConfig], Any]) -> None:
    """Compose root configuration `name` from the command line and call `run` on it, once a job in a sweep.

    A job that fails does not stop the others of a sweep; the first failure is raised when all are done.
    """
    register_schemas()
    failures: list[Exception] = []

    def job(config: DictConfig) -> Any:
        try:
            return run(config)
        except Exception as error:  # Hydra would print its own account of it
            failures.append(error)
            return None

    hydra.main(version_base="1.3", config_path=CONF, config_name=name)(job)()
    if failures:
        raise failures[0]


def open_run(config: DictConfig) -> tuple[RunFolder, DictConfig]:
    """The folder of a new run, or of the one that `resume` names together with the configuration it began with."""
    resume = config.get("resume")
    if resume is None:
        return RunFolder.create(_run_path(config), config), config
    others = [override for override in _overrides() if override.split("=")[0].lstrip("+") not in ("resume", "quiet")]
    if others:
        raise UserError(
            f"resume={resume} takes its configuration from that folder, but {' '.join(others)} came with it; leave the "
            "other overrides out."
        )
    folder = RunFolder.open(Path(resume))
    stored = folder.config()
    _check_same_command(config, stored, folder)
    stored.quiet = config.quiet
    return folder, stored


def _check_same_command(config: DictConfig, stored: DictConfig, folder: RunFolder) -> None:
    ours, theirs = ({str(key) for key in each} for each in (config, stored))
    odd = sorted((ours - theirs) | ({"agent"} & (theirs - ours)))
    if odd:
        raise UserError(
            f"{str(folder.path)!r} was not written by keepdrop {command_name()} (its {CONFIG} differs in {odd[0]!r}); "
            "continue it with the command that began it."
        )


def command_name() -> str:
    """The command of this process, as a user writes it."""
    return sys.argv[0].split()[-1]


def _run_path(config: DictConfig) -> Path:
    """`run_dir`, with one numbered folder a job in a sweep."""
    path = Path(config.run_dir)
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return path / str(HydraConfig.get().job.num)
    return path


def _overrides() -> Sequence[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


@contextmanager
def interruptible(folder: RunFolder) -> Iterator[None]:
    """Ctrl-C inside says how to go on: everything finished is on disk."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Continue with: keepdrop {command_name()} resume={folder.path}") from None


def plain(node: Any) -> Any:
    """A resolved configuration as plain containers."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def settings(node: Any, kind: type[SettingsT]) -> SettingsT:
    """A settings object (frozen dataclass) from its part of the configuration, checked against its types."""
    merged = OmegaConf.merge(structured(kind), node)
    try:
        built = OmegaConf.to_object(merged)
    except ValueError as error:
        # The agent package knows no UserError; its settings refuse a value with a ValueError.
        raise UserError(str(error)) from error
    assert isinstance(built, kind)
    return built
