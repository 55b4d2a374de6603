"""Where a run comes from: command, versions, machine, seed, splits, base."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from omegaconf import DictConfig

from ...envs.networks.checkpoint import hash_state
from ...envs.task import PruningTask
from ...errors import UserError
from .folder import FACTS, RunFolder

_PACKAGES = ("keepdrop", "torch", "gymnasium", "numpy", "hydra-core", "safetensors")


def keep_provenance(task: PruningTask, config: DictConfig, folder: RunFolder, notes: Sequence[str] = ()) -> None:
    """Write `facts.json`; a resumed run has it already, and is refused if its data or its base network changed.

    `notes` are sentences on the network that came, for the report.
    """
    known = folder.read_json(FACTS)
    if known is None:
        folder.write_json(FACTS, run_provenance(task, config) | {"notes": list(notes)})
        return
    base = known.get("base")
    for what, before, now in (
        ("data", known.get("splits"), task.splits.summary()),
        ("base network", base.get("sha256") if isinstance(base, dict) else None, hash_state(task.model)),
    ):
        if before != now:
            raise UserError(
                f"The {what} is not what {str(folder.path)!r} began with (its {FACTS} has another hash); put the "
                "old one back, or begin a new run."
            )


def run_provenance(task: PruningTask, config: DictConfig) -> dict[str, Any]:
    """`facts.json` of a run that prunes."""
    base = {"sha256": hash_state(task.model), "reward_split_accuracy": task.base.accuracy}
    return provenance(config.seed) | {"splits": task.splits.summary(), "base": base}


def provenance(seed: int) -> dict[str, Any]:
    """Command, versions, machine and git state of this process, for `facts.json`."""
    return {
        "command": command_line(),
        "seed": seed,
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "git": _git_hash(),
    }


def command_line() -> list[str]:
    """This process's command as it can be typed again."""
    return ["keepdrop", *sys.argv[0].split()[1:], *sys.argv[1:]]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_hash() -> str | None:
    """Commit of the working directory, with `+changes` where it differs; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode != 0:
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")
