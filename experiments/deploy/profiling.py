"""`keepdrop.profile`: measured times of pruned copies of a network on the device at hand, as a `LatencyProfile`.

Copies of random widths and the dense network take turns, and what counts is each copy's time as a fraction of the dense
network's beside it: a busy machine hits both. The file is written after every few copies, and a repeated call measures
only what is missing.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...envs.groups.finding import find_groups
from ...envs.networks.answers import as_called
from ...envs.networks.cost import count_cost
from ...envs.networks.hooks import hooked
from ...envs.networks.inputs import as_call, beside, resized, tensors_of
from ...envs.networks.memory_layout import arranged, common_layout
from ...envs.networks.modes import evaluating
from ...envs.networks.module_kinds import Inputs, is_conv, is_depthwise, is_recurrent
from ...envs.networks.unwrapping import plain_network
from ...envs.surgery.cutting import kept_rows, prune
from ...envs.surgery.filter_group import FilterGroup, coupled, select_groups
from ...envs.surgery.latency_meter import LatencyFit
from ...envs.surgery.latency_profile import (
    Conditions,
    LatencyProfile,
    LayerShape,
    Sample,
    TimeTable,
    load_profile,
    save_profile,
)
from ...envs.surgery.slicing import width
from ...errors import Notice, UserError
from ...ranges import COUNT, SEED, check_numbers
from ..runs.console import Terminal
from .latency import device_name, pass_seconds
from .onnx_cutting import CuttableOnnx
from .runtimes import Runner, check_runtimes, chosen_runtimes, runner

CHECKS = 10  # copies that predictions are compared with
TOGETHER = 4  # copies that take turns with the dense network
PASSES = 4  # of a network in its turn, after one that is not counted: caches hold its weights, as they do in use
LONG = 0.02  # seconds of a pass that needs no company
LEAST_SECONDS = 0.15  # of measuring per copy and table, where `repeats` turns take less
POOR = 0.2  # median error of predictions from which on a person is told
SCATTERED = 0.5  # likewise of the distance of a copy's quartiles, of its time: 0.01 to 0.2 unless threads had to wait
Wanted = tuple[tuple[int, ...], bool]
"""A copy to measure: filters kept per group, and whether it is one that predictions are compared with."""
PER_KIND, FEWEST, MOST = 6, 40, 120  # samples


class Watcher(Protocol):
    """What shows progress, such as `experiments.runs.console.Terminal`."""

    def progress(self, what: str, total: float) -> AbstractContextManager[Any]:
        """A bar."""
        ...

    def advance_by(self, step: float, detail: str | None = None) -> None:
        """Move it."""
        ...


@dataclass(frozen=True)
class ProfileSettings:
    """What is measured.

    Args:
        batch_sizes: images per pass.
        runtimes: any of eager, compile, onnxruntime, cuda-graphs.
        samples: pruned copies to measure, beside the 10 that predictions are checked on; null: 6 per group of another
            shape, 40 to 120.
        repeats: turns of every copy; passes of less than some milliseconds get more.
        widths: fractions of its filters that a group keeps in a copy; null: from one filter to all.
        seed: of the widths.
    """

    batch_sizes: Sequence[int] = (1, 64)
    runtimes: Sequence[str] = ("eager",)
    samples: int | None = None
    repeats: int = 5
    widths: Sequence[float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = list(self.batch_sizes)
        if not sizes or len(set(sizes)) != len(sizes):
            raise UserError(f"batch_sizes is {sizes}; expected at least one number of images, each one once.")
        if self.widths is not None and (not list(self.widths) or not all(0 < each <= 1 for each in self.widths)):
            raise UserError(f"widths is {list(self.widths)}; expected fractions above 0 and up to 1, as in [0.25,0.5].")
        check_numbers(self, batch_sizes=COUNT, samples=COUNT, repeats=COUNT, seed=SEED)


def profile(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    batch_sizes: Sequence[int] = ProfileSettings.batch_sizes,
    runtimes: Sequence[str] = ProfileSettings.runtimes,
    samples: int | None = None,
    repeats: int = ProfileSettings.repeats,
    widths: Sequence[float] | None = None,
    seed: int = 0,
    layers: Sequence[str] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> LatencyProfile:
    """Measure what pruned copies of a network take on the device it is on: the profile `LatencyMeter` predicts from.

    Args:
        model: the network, trained or not; it is copied, never changed.
        example_inputs: what it runs on: a tensor (B, ...), a tuple of positional or a mapping of keyword arguments.
        batch_sizes, runtimes, samples, repeats, widths, seed: see `ProfileSettings`.
        layers: names or globs of groups, None for all that can be pruned.
        out: JSON file, written after every few copies; one that is there is continued. None keeps nothing on disk.
        progress: whether a bar is shown, where there is a terminal.

    Raises UserError for settings that make no sense, a runtime that cannot run here, and a file of another network,
    device, number of threads or version, all before anything is measured.
    """
    settings = ProfileSettings(batch_sizes, runtimes, samples, repeats, widths, seed)
    network, _ = plain_network(model, example_inputs)
    watcher = Terminal(quiet=not progress)
    found = profile_network(network, example_inputs, settings, layers=layers, path=out, watcher=watcher)
    warn_of_doubts(found)
    return found


def profile_network(
    model: nn.Module,
    example: Inputs,
    settings: ProfileSettings,
    *,
    layers: Sequence[str] | None = None,
    path: str | Path | None = None,
    watcher: Watcher | None = None,
) -> LatencyProfile:
    """The same for a network in the form that is pruned (`ready_network`)."""
    return measured(unmeasured(model, example, settings, layers), path, watcher)


@dataclass(frozen=True)
class Unmeasured:
    """A network that can be profiled, checked; `profile` is what its file will hold, without a table yet."""

    model: nn.Module
    example: Inputs
    settings: ProfileSettings
    runtimes: Sequence[str]
    groups: Sequence[FilterGroup]
    profile: LatencyProfile


def unmeasured(
    model: nn.Module, example: Inputs, settings: ProfileSettings, layers: Sequence[str] | None = None
) -> Unmeasured:
    """Find out what there is to be measured; raises UserError as `profile` does."""
    example = beside(model, as_called(model, example))
    device = tensors_of(example)[0].device
    runtimes = _checked_runtimes(settings.runtimes, device)
    plan = find_groups(model, example, whole_blocks=True)  # some copies are without some of them, whoever asks
    groups = select_groups(plan, layers)
    named = tuple((group.name, group.n_filters) for group in groups)
    known = LatencyProfile(conditions_of(device), named, layer_shapes(model, example, groups), ())
    return Unmeasured(model, example, settings, runtimes, groups, known)


def measured(what: Unmeasured, path: str | Path | None = None, watcher: Watcher | None = None) -> LatencyProfile:
    """Its profile; of a file that is there only what it lacks is measured, and written to it."""
    known = what.profile
    if path is not None and Path(path).exists():
        known = _continued(load_profile(path), known, path)
    bench = _Bench(what.model, what.example, what.groups, what.settings)
    wanted = _wanted(what.groups, known, what.settings)
    total = len(wanted) * len(what.runtimes)
    with watcher.progress("profile", total) if watcher is not None else nullcontext():
        for runtime, start in itertools.product(what.runtimes, range(0, len(wanted), TOGETHER)):
            some = wanted[start : start + TOGETHER]
            known = bench.measured(runtime, some, known)
            if path is not None:
                save_profile(known, path)
            if watcher is not None:
                watcher.advance_by(len(some), runtime)
    return known


def warn_of_doubts(profile: LatencyProfile) -> None:
    """A `Notice` for every table that says little."""
    for sentence in filter(None, (doubt(profile, table) for table in profile.tables)):
        warnings.warn(sentence, Notice, stacklevel=3)


def doubt(profile: LatencyProfile, table: TimeTable) -> str | None:
    """Why the times of a table say little, as one made on a busy machine does, in a sentence; None where they do not.

    Either the turns of one and the same copy are far apart, or copies that were not fitted to are foretold badly. With
    one thread other programs hardly show, as its own clock stands still meanwhile; several threads wait for each other.
    """
    copies = (*table.samples, *table.checks)
    apart = statistics.median((each.high - each.low) / each.fraction for each in copies) if copies else 0.0
    if apart > SCATTERED:
        several = profile.conditions.n_threads > 1
        return (
            f"Turns of the same copy are {f'{apart:.0%}' if apart < 2 else f'{apart:.0f} times'} of its time apart in "
            f"the latency profile (quartiles, median of {len(copies)} copies; {table.runtime}, batch "
            f"{table.batch_size}, {profile.conditions}): the machine was busy"
            f"{', and threads waited for each other' * several}; measure it again when it is not"
            f"{', or with threads=1' * several}."
        )
    errors = [abs(each) for each in LatencyFit(profile, table.samples).errors(table.checks)]
    if errors and statistics.median(errors) > POOR:
        return (
            f"Times that the latency profile predicts are off by {statistics.median(errors):.0%} (median of "
            f"{len(errors)} copies): the machine was busy; measure it again when it is not."
        )
    return None


def _checked_runtimes(runtimes: Sequence[str], device: torch.device) -> list[str]:
    try:
        check_runtimes(runtimes, device)
    except UserError as error:
        raise UserError(str(error).replace("latency.runtimes", "runtimes")) from None
    return chosen_runtimes(runtimes, device)


def _continued(old: LatencyProfile, new: LatencyProfile, path: str | Path) -> LatencyProfile:
    """A file that is there, if it is of the same network under the same conditions; UserError if not."""
    old.check_conditions(new.conditions)
    if (old.groups, _without_blocks(old.layers)) != (new.groups, _without_blocks(new.layers)):
        raise UserError(
            f"{str(path)!r} holds the latency profile of another network, or of other layers of this one; give another "
            "file: out=..."
        )
    return replace(old, layers=new.layers)


def _without_blocks(layers: Sequence[LayerShape]) -> list[LayerShape]:
    """Layers without saying which go with a block: profiles that knew no blocks are continued."""
    return [replace(layer, gone_with=()) for layer in layers]


def _wanted(groups: Sequence[FilterGroup], known: LatencyProfile, settings: ProfileSettings) -> list[Wanted]:
    """The copies to measure."""
    kinds = len({layer.signature for layer in known.layers})
    count = settings.samples or min(MOST, max(FEWEST, PER_KIND * kinds))
    checks = design(groups, CHECKS, settings.seed + 1, settings.widths)
    samples = [each for each in design(groups, count, settings.seed, settings.widths) if each not in set(checks)]
    return [*((each, False) for each in dict.fromkeys(samples)), *((each, True) for each in dict.fromkeys(checks))]


def design(
    groups: Sequence[FilterGroup], count: int, seed: int, widths: Sequence[float] | None = None
) -> list[tuple[int, ...]]:
    """Filters kept per group, of `count` copies: every group's own random width around a level of the copy's own.

    Half of the copies keep multiples of 8, so that steps show against the others. Where blocks can go as a whole, every
    eighth copy is without some.
    """
    chance = random.Random(seed)
    copies = []
    for number in range(count):
        level, kept = chance.random(), []
        for group in groups:
            n, fraction = group.n_filters, (level + chance.random()) / 2 if number % 3 else chance.random()
            k = max(1, round((chance.choice(list(widths)) if widths else fraction) * n))
            rounded = min(n, max(8, round(k / 8) * 8)) if number % 2 and not widths else min(n, k)
            kept.append(0 if number % 8 == 5 and group.least == 0 and chance.random() < 0.3 else rounded)
        copies.append(tuple(kept))
    return copies


class _Bench:
    """Builds pruned copies and times them in turns with the dense network.

    Args:
        model: the dense network.
        example: what it runs on, on its device.
        groups: groups that copies lose filters of.
        settings: what is measured.
    """

    def __init__(
        self, model: nn.Module, example: Inputs, groups: Sequence[FilterGroup], settings: ProfileSettings
    ) -> None:
        self._model, self._example, self._groups, self._settings = model, example, tuple(groups), settings
        self._layout = common_layout([model], example)
        self._onnx: CuttableOnnx | None = None

    def measured(self, runtime: str, wanted: Sequence[Wanted], known: LatencyProfile) -> LatencyProfile:
        """The profile with these copies in it, at every batch size; those that it has are not measured again."""
        sizes = {size: _missing(known, runtime, size, wanted) for size in self._settings.batch_sizes}
        copies = {kept: self._copy(kept) for missing in sizes.values() for kept, _ in missing}
        with evaluating(self._model), torch.inference_mode():
            for size, missing in sizes.items():
                if missing:
                    known = self._with_times(known, runtime, size, missing, copies)
        return known

    def _copy(self, kept: Sequence[int]) -> tuple[nn.Module, dict[FilterGroup, Tensor]]:
        """A pruned copy; which filters stay makes no difference to its time."""
        masks = {group: torch.arange(group.n_filters) < n for group, n in zip(self._groups, kept, strict=True)}
        choices = coupled(masks)
        return prune(self._model, choices).eval(), choices

    def _with_times(
        self,
        known: LatencyProfile,
        runtime: str,
        size: int,
        wanted: Sequence[Wanted],
        copies: Mapping[tuple[int, ...], tuple[nn.Module, dict[FilterGroup, Tensor]]],
    ) -> LatencyProfile:
        inputs = resized(self._example, size)
        if runtime != "onnxruntime":
            inputs = arranged(inputs, self._layout)
        runners = [self._runner(self._model, {}, runtime, inputs)]
        runners += [self._runner(*copies[kept], runtime, inputs) for kept, _ in wanted]
        dense, *others = interleaved(runners, inputs, self._settings.repeats)
        if runtime == "compile":
            torch._dynamo.reset()  # it keeps a few graphs of a class, and runs all others uncompiled
        table = _table(known, runtime, size)
        for (kept, check), seconds in zip(wanted, others, strict=True):
            sample = _sample(kept, seconds, dense)
            if check:
                table = replace(table, checks=(*table.checks, sample))
            else:
                table = replace(table, samples=(*table.samples, sample))
        table = replace(table, dense=(*table.dense, _typical(dense)))
        tables = {(each.runtime, each.batch_size): each for each in known.tables} | {(runtime, size): table}
        return replace(known, tables=tuple(tables.values()))

    def _runner(self, model: nn.Module, choices: dict[FilterGroup, Tensor], runtime: str, inputs: Inputs) -> Runner:
        if runtime != "onnxruntime":
            return runner(model, runtime, inputs)
        if self._onnx is None:
            self._onnx = CuttableOnnx(self._model, self._example)
        return self._onnx.session(model, kept_rows(self._model, choices)) or runner(model, runtime, self._example)


def _missing(known: LatencyProfile, runtime: str, size: int, wanted: Sequence[Wanted]) -> list[Wanted]:
    table = _table(known, runtime, size)
    done = {each.kept for each in (*table.samples, *table.checks)}
    return [each for each in wanted if each[0] not in done]


def _table(known: LatencyProfile, runtime: str, size: int) -> TimeTable:
    found = [each for each in known.tables if (each.runtime, each.batch_size) == (runtime, size)]
    return found[0] if found else TimeTable(runtime, size, (), (), ())


def _typical(seconds: Sequence[float]) -> float:
    """The lower quartile: what disturbs a pass only ever makes it longer."""
    return sorted(seconds)[len(seconds) // 4]


def _sample(kept: tuple[int, ...], seconds: Sequence[float], dense: Sequence[float]) -> Sample:
    fractions = [a / b for a, b in zip(seconds, dense, strict=True)]
    low, _, high = statistics.quantiles(fractions, n=4) if len(fractions) > 1 else fractions * 3
    return Sample(kept, _typical(seconds) / _typical(dense), low, high)


def interleaved(runners: Sequence[Runner], inputs: Inputs, repeats: int) -> list[list[float]]:
    """Seconds of a pass, by runner and turn: they take turns of a few passes each, in alternating order."""
    device = tensors_of(inputs)[0].device
    seconds: list[list[float]] = [[] for _ in runners]
    for run in runners:
        run(inputs)
    started, turn = time.perf_counter(), 0
    while turn < repeats or time.perf_counter() - started < LEAST_SECONDS * len(runners):
        for place in range(len(runners))[:: 1 if turn % 2 else -1]:
            seconds[place].append(one_turn(runners[place], inputs, device))
        turn += 1
    return seconds


def one_turn(run: Runner, inputs: Inputs, device: torch.device) -> float:
    """Seconds of a pass: the fastest of a few in a row, after one that is not counted."""
    # One thread's own clock stands still while another program has the processor.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    found = []
    for _ in range(PASSES + 1):
        found.append(pass_seconds(run, inputs, device, clock))
        if found[-1] > LONG:
            break
    return min(found[1:] or found)


def conditions_of(device: torch.device) -> Conditions:
    """Name of the device, threads and versions, here and now."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return Conditions(device_name(device), device.type, threads, torch.__version__, _version("onnxruntime"))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def layer_shapes(model: nn.Module, example: Inputs, groups: Sequence[FilterGroup]) -> tuple[LayerShape, ...]:
    """The layers with products whose channels any of `groups` decides on, in the order of the network's modules."""
    cost, sizes, found = count_cost(model, example), _sizes(model, example), []
    for name in cost.modules:
        module, macs = model.get_submodule(name), cost.modules[name].macs
        cuts = [(place, cut) for place, group in enumerate(groups) for cut in group.cuts if cut.module == name]
        into, out = (
            tuple((place, cut.channels.shape[1]) for place, cut in cuts if cut.axis == axis) for axis in ("in", "out")
        )
        if macs and (into or out):
            elements, spatial = sizes.get(name, (0, ()))
            widths = tuple(_width(module, axis) for axis in ("in", "out"))
            signature = f"{_operator(module)} {_geometry(module)} to {spatial}"
            gone = tuple(place for place, group in enumerate(groups) if _goes_with(name, group))
            found.append(LayerShape(name, signature, macs, elements, (widths[0], widths[1]), into, out, gone))
    return tuple(found)


def _goes_with(name: str, group: FilterGroup) -> bool:
    branch = group.branch
    return branch is not None and any(name == each or name.startswith(f"{each}.") for each in branch.inside)


def _width(module: Any, axis: str) -> int:
    """A depthwise convolution has one input channel per filter, and what a recurrent layer puts out stays."""
    if axis == "in":
        return 1 if is_depthwise(module) else width(module, "in")
    return int(module.hidden_size) if is_recurrent(module) else width(module, "out")


def _operator(module: Any) -> str:
    kernel = "x".join(map(str, module.kernel_size)) if is_conv(module) else ""
    return f"{'depthwise' if is_depthwise(module) else type(module).__name__}{kernel}"


def _geometry(module: Any) -> str:
    if not is_conv(module):
        return "-"
    groups = "" if is_depthwise(module) else f" groups {module.groups}"
    return f"stride {module.stride} dilation {module.dilation}{groups}"


def _sizes(model: nn.Module, example: Inputs) -> dict[str, tuple[int, tuple[int, ...]]]:
    """By module, numbers put out per image over all calls, and the spatial shape of the output."""
    found: dict[str, tuple[int, tuple[int, ...]]] = {}

    def recording(name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        def record(called: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim():
                before = found.get(name, (0, ()))[0]
                found[name] = (before + output.numel() // max(1, len(output)), tuple(output.shape[2:]))

        if name:
            yield module.register_forward_hook(record)

    args, kwargs = as_call(example)
    with hooked(model, recording), evaluating(model), torch.no_grad():
        model(*args, **kwargs)
    return found
