"""Clock of a run: the measured times that targets, rewards and widths go by, from a file or measured first."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ...envs.networks.module_kinds import Inputs
from ...envs.surgery.filter_group import FilterGroup
from ...envs.surgery.latency_meter import LatencyMeter
from ...envs.surgery.latency_profile import LatencyProfile, load_profile, save_profile
from ...envs.surgery.limits import AUTO, Limits
from ...errors import Notice, UserError
from ...ranges import COUNT, check_numbers
from ...remote import local_if_there
from ..runs.mirror import cache_folder
from .profiling import ProfileSettings, Watcher, conditions_of, doubt, measured, unmeasured
from .runtimes import RUNTIMES, why_not

PROFILE = "profile.json"  # in a run's folder
PROFILES = "profiles"  # in the folder that keepdrop keeps files in between commands


@dataclass(frozen=True)
class ClockSettings:
    """Which measured times count.

    Args:
        file: of `keepdrop profile`; null measures what is needed before the search, and keeps it in the run's folder
            and for later commands with the same network and device.
        runtime: eager, compile, onnxruntime or cuda-graphs; null takes the file's first, eager in a new profile.
        batch_size: images per pass; null takes the file's first, 1 in a new profile.
    """

    file: str | None = None
    runtime: str | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.runtime is not None and self.runtime not in RUNTIMES:
            raise UserError(f"profile.runtime is {self.runtime!r}; expected one of {', '.join(RUNTIMES)}.")
        check_numbers(self, batch_size=COUNT)


class ProfileClock:
    """Makes the meter of seconds from a profile (`envs.surgery.meters.Clock`).

    Args:
        profile: of the network's own architecture, on this device.
        runtime, batch_size: which of its tables; None takes the first.
        file: where it lies that it was measured into just now, for later commands; None if it was not.
    """

    def __init__(
        self,
        profile: LatencyProfile,
        runtime: str | None = None,
        batch_size: int | None = None,
        file: Path | None = None,
    ) -> None:
        self.profile, self.file = profile, file
        self.table = profile.table(runtime, batch_size)
        self._meters: dict[tuple[str, ...], LatencyMeter] = {}

    def __call__(self, model: nn.Module, groups: Sequence[FilterGroup]) -> LatencyMeter:
        """The meter for some groups of the network; fitted once."""
        names = tuple(group.name for group in groups)
        if names not in self._meters:
            self._meters[names] = LatencyMeter(model, groups, self.profile, self.table.runtime, self.table.batch_size)
        self.profile.check_network(model, groups)
        meter = copy.copy(self._meters[names])
        meter.groups = tuple(groups)
        return meter

    @property
    def conditions(self) -> str:
        """What a time holds for, for a person."""
        return f"{self.table.runtime}, batch {self.table.batch_size}, {self.profile.conditions}"


def read_clock(source: str | Path | LatencyProfile, chosen: ClockSettings, device: torch.device) -> ProfileClock:
    """The clock of a profile; UserError for one of another device, or without the runtime and batch size."""
    profile = source if isinstance(source, LatencyProfile) else load_profile(source)
    profile.check_conditions(conditions_of(device))
    return ProfileClock(profile, chosen.runtime, chosen.batch_size)


def find_clock(
    model: nn.Module,
    example: Inputs,
    chosen: ClockSettings,
    source: str | Path | LatencyProfile | None,
    watcher: Watcher | None = None,
    *,
    timed: bool,
    limits: Limits,
) -> ProfileClock | None:
    """The measured times that a target, a reward or widths go by; None where none of them does.

    Args:
        model: the dense network, on the device that counts.
        example: an input for it.
        chosen: which times.
        source: a profile or its file; None measures one, if the target or the reward is of time.
        watcher: shows the measuring.
        timed: whether the target or the reward is of time.
        limits: of the surgery, whose widths may go by time.

    Raises UserError for a profile of another device or network, and for widths by time alone without a profile.
    """
    by_width = limits.round_to == AUTO
    if not timed and not by_width:
        return None
    if source is not None:
        return _trusted(read_clock(source, chosen, next(model.parameters()).device))
    if not timed:
        raise UserError(
            f"surgery.round_to={AUTO} takes the multiple that a profile of this device shows, and there is none; make "
            "one with keepdrop profile and",
            "give it as profile=FILE, or give a number of channels.",
            "give profile.file=FILE, or give a number of channels.",
        )
    return _trusted(measured_clock(model, example, chosen, watcher))


def _trusted(clock: ProfileClock) -> ProfileClock:
    """The clock; a `Notice` where its profile says little, as one made on a busy machine does."""
    if sentence := doubt(clock.profile, clock.table):
        warnings.warn(sentence, Notice, stacklevel=3)
    return clock


def resolved(limits: Limits, clock: ProfileClock | None, model: nn.Module, groups: Sequence[FilterGroup]) -> Limits:
    """The limits with a number of channels for widths that go by time."""
    if limits.round_to != AUTO:
        return limits
    assert clock is not None, "find_clock refuses widths by time without a profile"
    return replace(limits, round_to=clock(model, groups).round_multiple())


def measured_clock(
    model: nn.Module, example: Inputs, chosen: ClockSettings, watcher: Watcher | None = None
) -> ProfileClock:
    """Measure the one table that is needed; UserError for a runtime that cannot run here.

    It is kept for later commands, which take it (with a `Notice`) in place of measuring again; one made on a busy
    machine is not.
    """
    runtime, size, device = chosen.runtime or "eager", chosen.batch_size or 1, next(model.parameters()).device
    if why := why_not(runtime, device):
        raise UserError(f"profile.runtime is {runtime}, which {why}")
    what = unmeasured(model, example, ProfileSettings(batch_sizes=(size,), runtimes=(runtime,)))
    file = _file_for(what.profile)
    before = load_profile(file).tables if file is not None and file.exists() else ()
    found = measured(what, file, watcher)
    table = found.table(runtime, size)
    if file is not None and doubt(found, table):
        save_profile(replace(found, tables=tuple(each for each in found.tables if each != table)), file)
        file = None
    if file is not None and table in before:
        warnings.warn(
            f"Times are those of {str(file)!r}, which an earlier command measured for this network and device; delete "
            "it to have them measured again.",
            Notice,
            stacklevel=3,
        )
        file = None
    return ProfileClock(replace(found, tables=(table,)), runtime, size, file)


def _file_for(profile: LatencyProfile) -> Path | None:
    """Where times of this network under these conditions are kept between commands; None where nothing can be kept."""
    content = json.dumps(dataclasses.asdict(replace(profile, tables=())), sort_keys=True)
    file = cache_folder() / PROFILES / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            return None
        if file.exists() and not _is_readable(file):
            file.unlink()  # damaged, or of another version
    except OSError:
        return None
    return file


def _is_readable(file: Path) -> bool:
    try:
        load_profile(file)
    except UserError:
        return False
    return True


@contextmanager
def keeping_times(clock: ProfileClock | None) -> Iterator[None]:
    """To a UserError within is added where the times lie that were measured before it, and that they are of use."""
    try:
        yield
    except UserError as error:
        if clock is None or clock.file is None:
            raise
        kept = f"The times that were measured are kept in {str(clock.file)!r}, and the next command goes by them."
        more = UserError(f"{error} {kept}")
        more.typed = f"{error.typed} {kept}"
        raise more from error.__cause__


def kept_profile(folder: str | Path | None) -> Path | None:
    """The profile that a run began with, wherever its folder is; None if there is none."""
    return None if folder is None else local_if_there(f"{str(folder).rstrip('/')}/{PROFILE}")


def keep_profile(clock: ProfileClock | None, folder: Path) -> None:
    """A run's profile in its folder, so that a resumed run goes by the same times."""
    if clock is not None and not (folder / PROFILE).exists():
        save_profile(clock.profile, folder / PROFILE)
