"""Stored configurations, a run's config.yaml: read, offered to Hydra, and kept from running code nobody typed.

A run folder may come from anybody, and `_target_` names any importable function. From a stored configuration only the
targets that `conf/` itself offers are called; another one runs if the same `_target_` was typed in this command.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...errors import UserError
from ..pruning.agent_places import local_folder
from ..runs.folder import CONFIG, RunFolder
from .cli_errors import CONF, expected, groups
from .schema import INHERITED, ApplyConfig, structured

UNINHERITED = {"data": "digits", "network": "small_cnn", "augment": "shift", "metric": "top1"}  # as in conf/prune.yaml
OWN = ("agents", "checkpoint", "controls", "finetune_controls", "seed", "run_dir", "quiet", "export", "resume")


@functools.cache
def offered_targets() -> frozenset[str]:
    """Every `_target_` that the options of `conf/` name."""
    found = set()
    for group, options in groups().items():
        for option in options:
            text = (resources.files(CONF) / group / f"{option}.yaml").read_text(encoding="utf-8")
            found |= {target for _, target in targets_in(OmegaConf.to_container(OmegaConf.create(text)))}
    return frozenset(found - {"???"})


def is_offered(target: Any) -> bool:
    """Whether a `_target_` is one of keepdrop's own."""
    return isinstance(target, str) and target in offered_targets()


def targets_in(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every `_target_` below a plain node, dictionaries and lists alike, with the dotted key it stands at."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield f"{key}._target_".lstrip("."), node["_target_"]
        for name, value in node.items():
            yield from targets_in(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from targets_in(value, f"{key}.{index}")


def check_targets(stored: Any, typed: Mapping[str, Any], run: str | Path) -> None:
    """Raise a `UserError` for a stored configuration, plain, that names code neither keepdrop's own nor `typed`.

    Args:
        stored: what is about to be instantiated.
        typed: what was given on this command line, by dotted key (`entry_point.typed`).
        run: the folder it comes from.
    """
    check_plain(stored, run)
    for key, target in targets_in(stored):
        if is_offered(target) or (key in typed and typed[key] == target):
            continue
        nameable = isinstance(target, str) and not any(part.isdigit() for part in key.split("."))
        what = f"type {key}={target} in this command too." if nameable else f"give {key.partition('.')[0]} anew."
        raise UserError(
            f"The {CONFIG} of {str(run)!r} names {target!r} as {key}: code that is not keepdrop's own and would run; "
            f"if you trust it, {what}"
        )


def check_plain(stored: Any, run: str | Path) -> None:
    """Refuse what would make Hydra look elsewhere for a setting, which no run writes, with a `UserError`."""
    if (key := next(_odd(stored), None)) is not None:
        raise UserError(
            f"The {CONFIG} of {str(run)!r} holds an interpolation or a defaults list at {key!r}, which keepdrop does "
            "not write; expected plain settings: use the folder as the run left it."
        )


def _odd(node: Any, key: str = "") -> Iterator[str]:
    """Keys that hold what makes Hydra look elsewhere: interpolations, lists of defaults."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            here = f"{key}.{name}".lstrip(".")
            if name == "defaults" or "${" in str(name):
                yield here
            yield from _odd(value, here)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _odd(value, f"{key}.{index}")
    elif isinstance(node, str) and "${" in node:
        yield key


def run_with_config(run: str | Path) -> RunFolder | None:
    """The run folder itself, or the first job of a sweep, that has a config.yaml; None without one."""
    path = local_folder(run)
    jobs = sorted(path.glob("*/")) if path.is_dir() else []
    return next((RunFolder.open(each) for each in (path, *jobs) if (each / CONFIG).is_file()), None)


def inherit(run: str | Path | None) -> None:
    """Register what `keepdrop apply` takes from the run of its agents, so that Hydra composes and checks it.

    Args:
        run: with a configuration (`run_with_config`); None registers nothing but the schema's defaults.

    Raises:
        UserError: its configuration is not one of a run that prunes.
    """
    names = [each.name for each in fields(ApplyConfig) if each.name not in OWN]
    folder = None if run is None else run_with_config(str(run))
    stored: Any = {} if folder is None else OmegaConf.to_container(folder.config())
    if "zoo" in stored:  # of keepdrop pretrain, whose agent prunes networks of which that run knows nothing
        folder, stored = None, {}
    taken = {name: stored[name] for name in names if stored.get(name) is not None}
    if folder is not None:
        check_plain(taken, folder.path)
        _check_schema(taken, folder.path)
    store, chosen = ConfigStore.instance(), set(groups())
    for group in chosen & set(taken):
        store.store(group=group, name=INHERITED, node=taken[group])
    before = {} if folder is not None else UNINHERITED
    defaults: list[Any] = [
        {group: INHERITED if group in taken else before.get(group)} for group in names if group in chosen
    ]
    rest = {name: value for name, value in taken.items() if name not in chosen}
    store.store(name=INHERITED, node={"defaults": [*defaults, "_self_"], **rest})


def _check_schema(taken: Mapping[str, Any], run: Path) -> None:
    for name in set(groups()) & set(taken):
        if not isinstance(taken[name], Mapping):
            raise UserError(f"The {CONFIG} of {str(run)!r} has {name}={taken[name]!r}; expected settings below it.")
    try:
        OmegaConf.merge(structured(ApplyConfig), dict(taken))
    except OmegaConfBaseException as error:
        raise UserError(
            f"The {CONFIG} of {str(run)!r} has a {error.full_key} that keepdrop apply cannot take over; expected "
            f"{expected(error)}."
        ) from error
