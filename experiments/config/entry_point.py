"""Entry point of every command: compose the configuration, open or resume the run folder, answer Ctrl-C."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import ValidationError

from ...errors import UserError
from ...ranges import check_number
from ...remote import is_url
from ..deploy.clock import PROFILE
from ..pruning.input_checks import resolve_device
from ..runs.folder import CONFIG, FACTS, RunFolder, first_free
from ..training.devices import check_count, leads, part
from .cli_errors import expected
from .schema import INHERITED, RANGES, ROOTS, register_schemas, structured
from .stored import check_targets, is_offered, targets_in

SettingsT = TypeVar("SettingsT")

FREE = ("resume", "quiet", "engine")  # what a resumed run may be given anew: no result depends on it
DEVICES = ("base.devices", "finetune.devices", "recovery.train.devices", "train.devices")  # likewise, but for rounding
MODULES = "modules"  # the setting that allows code, by name
CONF = "pkg://keepdrop.conf"
IN_A_JOB = ("hydra.sweep.dir=.", "hydra.sweep.subdir=.")


def run_with_hydra(name: str, run: Callable[[DictConfig], Any]) -> None:
    """Compose root configuration `name` from the command line and call `run` on it, once a job in a sweep.

    A job that fails does not stop the others of a sweep; the first failure is raised when all are done.
    """
    register_schemas()
    failures: list[Exception] = []
    process, here = os.getpid(), Path.cwd()

    def job(config: DictConfig) -> Any:
        try:
            if os.getpid() != process:
                _enter(here)
            check_settings(config, ROOTS[name])
            devices = most_devices(config)
            return run(config) if devices == 1 else run_together(run, config, devices)
        except Exception as error:
            if os.getpid() != process:  # a launcher's worker: this list is a copy, and only Hydra tells the parent
                raise
            failures.append(error)  # Hydra would print its own account of it
            return None

    SweepFolder.current = None
    try:
        hydra.main(version_base="1.3", config_path=CONF, config_name=name)(job)()
    finally:
        if SweepFolder.current is not None:
            SweepFolder.current.tidy()
    if failures:
        raise failures[0]


def most_devices(config: DictConfig) -> int:
    """Devices of the training that takes the most, what was typed beside `resume` included."""
    return max(OmegaConf.select(config, name, default=1) for name in DEVICES)


def run_together(run: Callable[[DictConfig], Any], config: DictConfig, devices: int) -> Any:
    """A command some of whose trainings run on several devices; of processes of torchrun or Slurm the first runs it."""
    device = resolve_device(config.device)
    check_count(devices, device)
    if not leads(devices, device.type):
        return None
    try:
        return run(config)
    finally:
        part()


def _enter(folder: Path) -> None:
    """Work where the sweep was started: a launcher's worker, above all on another machine, may begin elsewhere."""
    try:
        os.chdir(folder)
    except OSError:
        raise UserError(
            f"A job of the sweep cannot enter {str(folder)!r} on {platform.node()}, where it began; start "
            "the sweep in one that all machines share."
        ) from None


class SweepFolder(Callback):
    """Keeps Hydra from making folders of its own for jobs, and takes `multirun.yaml` away where nothing ran.

    `conf/common.yaml` names it as a callback, because the folder is known only once Hydra has composed.
    """

    current: ClassVar[SweepFolder | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember what was there before; without `run_dir` the folder is one that no other sweep has."""
        given, path = list(config.hydra.overrides.task), Path(str(config.hydra.sweep.dir))
        with read_write(config), open_dict(config):
            # Hydra would make the folder of a job before `_enter`, so in whatever folder a launcher's worker begins.
            config.hydra.overrides.hydra = [*config.hydra.overrides.hydra, *IN_A_JOB]
        if elsewhere := is_url(path):  # where Hydra cannot write, and only the runs themselves do
            path = Path(tempfile.gettempdir()) / f"keepdrop-sweep-{uuid.uuid4().hex}"
            with read_write(config), open_dict(config):
                config.hydra.sweep.dir = str(path)
        self.made = [each for each in (path, *path.parents) if not each.exists()]
        if "run_dir" in config and not elsewhere and not any(each.startswith("run_dir=") for each in given):
            free = first_free(path)
            self.made = [free, *(each for each in self.made if each != path)]
            if free != path:
                with read_write(config), open_dict(config):  # every job is composed anew, from these overrides
                    config.hydra.sweep.dir = str(free)
                    config.hydra.overrides.task = [*given, f"run_dir='{free}'"]
            path = free
        self.path = path
        self.before = set(self.path.iterdir()) if self.path.is_dir() else set()
        self.yaml = self.path / "multirun.yaml"
        self.old = self.yaml.read_bytes() if self.yaml.is_file() else None
        SweepFolder.current = self

    def tidy(self) -> None:
        """Remove new, empty folders; with no job folder left, `multirun.yaml` as well."""
        if not self.path.is_dir():
            return
        new = [each for each in self.path.iterdir() if each not in self.before and each.is_dir()]
        for each in new:
            with suppress(OSError):  # a run's folder is not empty, and stays
                each.rmdir()
        if any(each.exists() for each in new):
            return
        if self.old is not None:
            self.yaml.write_bytes(self.old)
        else:
            self.yaml.unlink(missing_ok=True)
        for each in self.made:
            with suppress(OSError):
                each.rmdir()


@contextmanager
def open_run(config: DictConfig) -> Iterator[tuple[RunFolder, DictConfig]]:
    """The folder of a new run, or of the one that `resume` names together with the configuration it began with.

    No other process works in it inside. What the run wrote is compared with its hashes before anything is read.
    """
    resume = config.get("resume")
    if resume is None:
        folder = RunFolder.create(run_path(config), config, numbered="run_dir" not in typed() and not is_sweep())
        with closing(folder), folder.naming():
            yield folder, config
        return
    folder = RunFolder.open(str(resume))
    with closing(folder), folder.naming():
        folder.lock()
        folder.check_hashes()
        stored = _stored(config, folder)
        folder.publish()
        yield folder, stored


def _stored(config: DictConfig, folder: RunFolder) -> DictConfig:
    """The configuration that a resumed run began with; what was added to keepdrop since comes from the defaults."""
    stored = folder.config()
    _check_repeated(config.resume, stored)
    _check_same_command(config, stored, folder)
    for key in config:
        if key not in stored:
            stored[key] = config[key]
    check_settings(stored, ROOTS[command_name().replace("-", "_")])
    stored.quiet = config.quiet
    for name in DEVICES:  # another machine may have more or fewer
        if name in typed():
            OmegaConf.update(stored, name, OmegaConf.select(config, name))
    if any(key.partition(".")[0] == "engine" for key in typed()):
        stored.engine = config.engine
    if "profile" in stored and (folder / PROFILE).is_file():
        stored.profile.file = str(folder / PROFILE)  # the times that it began with
    return stored


def _check_repeated(resume: str, stored: DictConfig) -> None:
    """Refuse settings beside `resume`, and a stored `_target_` that is not keepdrop's and was not typed again."""
    content = OmegaConf.to_container(stored, resolve=True)
    assert isinstance(content, dict)
    known = {**dict(targets_in(content)), **{key: content[key] for key in (MODULES,) if key in content}}
    others = [
        f"{key}={value}"
        for key, value in typed().items()
        if key not in DEVICES and key.partition(".")[0] not in FREE and (key not in known or known[key] != value)
    ]
    if others:
        raise UserError(
            f"resume={resume} takes its configuration from that folder, but {' '.join(others)} came with it; leave the "
            "other overrides out."
        )
    check_targets(content, typed(), resume)


def _check_same_command(config: DictConfig, stored: DictConfig, folder: RunFolder) -> None:
    ours, theirs = ({str(key) for key in each} for each in (config, stored))
    began = (folder.read_json(FACTS) or {}).get("command")
    # Facts name the command; a run that stopped before it wrote them is known by its settings.
    known = isinstance(began, list) and began[1:2] == [command_name()]
    odd = [] if known else sorted((ours - theirs) | ({"agent"} & (theirs - ours)))
    if odd:
        raise UserError(
            f"{str(folder.path)!r} was not written by keepdrop {command_name()} (its {CONFIG} differs in {odd[0]!r}); "
            "continue it with the command that began it."
        )


def command_name() -> str:
    """The command of this process, as a user writes it."""
    return sys.argv[0].split()[-1]


def run_path(config: DictConfig) -> str:
    """Where a new run is written: `run_dir`, with one numbered folder a job in a sweep."""
    path = str(config.run_dir)
    return f"{path.rstrip('/')}/{HydraConfig.get().job.num}" if is_sweep() else path


def is_sweep() -> bool:
    """Whether this is a job of a sweep (`-m`)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def first_value(key: str, arguments: Sequence[str]) -> Any:
    """What a command line gives for `key` before Hydra reads it, the first value of a sweep; None without one."""
    given = [each for each in arguments if each.startswith(f"{key}=")]
    with suppress(OverrideParseException):  # Hydra says it again, with the argument's name
        for override in OverridesParser.create().parse_overrides(given[-1:]):
            value = next(override.sweep_iterator()) if override.is_sweep_override() else override.value()
            return getattr(value, "text", value)  # a quoted string comes as an object
    return None


def typed() -> dict[str, Any]:
    """What was given on this command line: values by dotted key, those inside `key={...}` one by one.

    An option of a group is there as `group: option`, a deletion as None.
    """
    if not HydraConfig.initialized():
        return {}
    parser = OverridesParser.create()
    found: dict[str, Any] = {}
    for text in HydraConfig.get().overrides.task:
        override = parser.parse_override(text)
        found |= dict(_dotted(override.key_or_group, override.value()))
    return found


def is_decided(section: str) -> bool:
    """Whether a section is not merely this command's default: typed here, or of a run that began with it.

    The processes of a comparison, which have no command line, are given a configuration in which all is decided.
    """
    if not HydraConfig.initialized():
        return True
    inherited = HydraConfig.get().runtime.choices.get(section) == INHERITED
    return inherited or any(key.partition(".")[0] in (section, "resume") for key in typed())


def _dotted(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, each in value.items():
            yield from _dotted(f"{key}.{name}", each)
    else:
        yield key, value


@contextmanager
def interruptible(folder: RunFolder) -> Iterator[None]:
    """Ctrl-C or SIGTERM inside says how to resume: everything finished is on disk."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise type(stop)(f"Continue with: keepdrop {command_name()} {resuming(folder)}") from None


def resuming(folder: RunFolder) -> str:
    """The overrides that resume a run: its folder, and every `_target_` and module that is not keepdrop's own."""
    config = folder.config()
    own = [f"{key}={target}" for key, target in targets_in(OmegaConf.to_container(config)) if not is_offered(target)]
    if modules := config.get(MODULES):
        own.append(f"{MODULES}=[{','.join(modules)}]")
    return " ".join([f"resume={folder.place}", *own])


def allowed_modules(config: DictConfig) -> list[str]:
    """Modules whose code a file may call: what was typed here, never what the folder of a resumed run says."""
    given = typed()
    if "resume" not in given:
        return list(plain(config[MODULES]))
    return [str(getattr(each, "text", each)) for each in given.get(MODULES) or []]


def plain(node: Any) -> Any:
    """A resolved configuration as plain containers."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def settings(node: Any, kind: type[SettingsT]) -> SettingsT:
    """A settings object (frozen dataclass) from its part of the configuration, checked against its types."""
    try:
        merged = OmegaConf.merge(structured(kind), node)
    except ValidationError as error:
        key = str(error.full_key)
        where = ".".join(part for part in (str(node._get_full_key(None)), key) if part)
        raise UserError(f"{where} is {OmegaConf.select(node, key)!r}; expected {expected(error)}.") from error
    try:
        built = OmegaConf.to_object(merged)
    except UserError as error:  # which of several sections of one kind it is about
        where, first = str(node._get_full_key(None)) if OmegaConf.is_config(node) else "", str(error).split()[0]
        known = where and first in {each.name for each in fields(kind)}  # type: ignore[arg-type]
        raise UserError(f"{where}.{error.typed}" if known else error.typed) from error
    assert isinstance(built, kind)
    return built


def check_settings(config: DictConfig, root: type) -> None:
    """Refuse values of a root configuration that make no sense, whatever the command then uses; `UserError`."""
    kinds = get_type_hints(root)
    for name in (str(key) for key in config):
        if isinstance(kind := kinds.get(name), type) and is_dataclass(kind):
            settings(config[name], kind)
        elif name in RANGES and not OmegaConf.is_missing(config, name):
            check_number(name, plain(config[name]), RANGES[name])
