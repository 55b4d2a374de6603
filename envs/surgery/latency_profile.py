"""Latency profile of a network on one device: measured times of pruned copies of it, as data, and its JSON file.

A profile belongs to an architecture, not to its weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...atomic import write_atomically
from ...errors import UserError
from ...strict_json import parse_json
from .filter_group import FilterGroup
from .slicing import width

FORMAT = "keepdrop-latency-profile"
VERSION = 1
LARGEST = 2**53
AGAIN = "measure again with keepdrop profile"


@dataclass(frozen=True)
class Conditions:
    """What a time depends on besides the network: a profile holds for exactly these.

    Args:
        device: name of the processor or GPU, such as "AMD EPYC 9654".
        kind: "cpu", "cuda" or "mps".
        n_threads: threads of the processor a pass may use; 0 on a GPU.
        torch: version.
        onnxruntime: version; None where it is not installed.
        dtype: of weights and images.
    """

    device: str
    kind: str
    n_threads: int
    torch: str
    onnxruntime: str | None
    dtype: str = "float32"

    def __str__(self) -> str:
        threads = "" if not self.n_threads else f", {self.n_threads} thread{'s' if self.n_threads > 1 else ''}"
        return f"{self.device}{threads}"


@dataclass(frozen=True)
class LayerShape:
    """One layer whose channels the groups decide on, as it is in the dense network.

    Args:
        module: its qualified name.
        signature: everything its time depends on but its widths; layers with equal ones share what is learnt.
        macs: multiply-accumulates per image.
        elements: numbers it puts out per image.
        widths: input and output channels.
        into, out: (position of a group, channels that go with one of its filters).
        gone_with: positions of groups of which any that keeps nothing takes the whole layer with it.
    """

    module: str
    signature: str
    macs: int
    elements: int
    widths: tuple[int, int]
    into: tuple[tuple[int, int], ...]
    out: tuple[tuple[int, int], ...]
    gone_with: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One pruned copy: filters kept per group and its time as a fraction of the dense network's, measured beside it.

    `low` and `high` are the quartiles of the fraction.
    """

    kept: tuple[int, ...]
    fraction: float
    low: float
    high: float


@dataclass(frozen=True)
class TimeTable:
    """What was measured in one runtime with one batch size.

    Args:
        runtime: "eager", "compile", "onnxruntime" or "cuda-graphs".
        batch_size: images per pass.
        dense: seconds of a pass of the dense network, one for every few copies that it took turns with.
        samples: measured copies that a prediction is fitted to.
        checks: measured copies it is compared with, and never fitted to.
    """

    runtime: str
    batch_size: int
    dense: tuple[float, ...]
    samples: tuple[Sample, ...]
    checks: tuple[Sample, ...]

    @property
    def dense_seconds(self) -> float:
        """Their median."""
        return statistics.median(self.dense)

    @property
    def dense_spread(self) -> tuple[float, float]:
        """Their quartiles."""
        low, _, high = statistics.quantiles(self.dense, n=4) if len(self.dense) > 1 else self.dense * 3
        return low, high


@dataclass(frozen=True)
class LatencyProfile:
    """Times of one network on one device, in every runtime and batch size that was asked for."""

    conditions: Conditions
    groups: tuple[tuple[str, int], ...]
    layers: tuple[LayerShape, ...]
    tables: tuple[TimeTable, ...]

    def table(self, runtime: str | None = None, batch_size: int | None = None) -> TimeTable:
        """The table of a runtime and a batch size (None: the first that fits); UserError where there is none."""
        for each in self.tables:
            if runtime in (None, each.runtime) and batch_size in (None, each.batch_size):
                return each
        known = ", ".join(f"{each.runtime} at batch {each.batch_size}" for each in self.tables) or "nothing yet"
        asked = f"{runtime or 'any runtime'} at batch {batch_size or 'any'}"
        raise UserError(
            f"The latency profile holds {known}, not {asked}; add it with keepdrop profile "
            f"runtimes=[{runtime or 'eager'}] batch_sizes=[{batch_size or 1}] and the same out=..."
        )

    def check_network(self, model: nn.Module, groups: Sequence[FilterGroup]) -> None:
        """UserError unless `groups` and the layers of `model` are those that were measured."""
        known = dict(self.groups)
        for group in groups:
            if known.get(group.name) != group.n_filters:
                measured = f"with {known[group.name]} filters" if group.name in known else "not at all"
                raise UserError(
                    f"Group {group.name!r} has {group.n_filters} filters and the latency profile measured it "
                    f"{measured}: it belongs to another network; {AGAIN}."
                )
        modules = dict(model.named_modules())
        for layer in self.layers:
            module = modules.get(layer.module)
            if module is None or width(module, "out") != layer.widths[1]:
                raise UserError(
                    f"The latency profile measured {layer.module!r} with {layer.widths[1]} outputs, which this network "
                    f"has not: it belongs to another network; {AGAIN}."
                )

    def check_conditions(self, here: Conditions) -> None:
        """UserError unless the profile was measured under the same conditions; the first difference is named."""
        for field in dataclasses.fields(Conditions):
            theirs, ours = getattr(self.conditions, field.name), getattr(here, field.name)
            unused = field.name == "onnxruntime" and all(each.runtime != "onnxruntime" for each in self.tables)
            if theirs != ours and not unused:
                what = {"n_threads": "threads", "kind": "kind of device"}.get(field.name, field.name)
                raise UserError(
                    f"The latency profile was measured with {what} {theirs}, and here it is {ours}: times do not carry "
                    f"over; {AGAIN} (another file: out=...)."
                )


def save_profile(profile: LatencyProfile, path: str | Path) -> None:
    """Write it as JSON, whole or not at all."""
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(profile)}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def load_profile(path: str | Path) -> LatencyProfile:
    """Read a profile; UserError for a file that is missing, damaged, or no profile."""
    try:
        content = parse_json(Path(path).read_bytes(), largest_integer=LARGEST)
        return _profile(content)
    except OSError as error:
        raise UserError(
            f"There is no latency profile {str(path)!r} ({error.strerror}); make one with keepdrop profile out={path}."
        ) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{str(path)!r} is no latency profile that this version can read ({error}); {AGAIN} out={path}."
        ) from error


def _profile(content: Any) -> LatencyProfile:
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise ValueError(f"it does not say format {FORMAT!r}, version {VERSION}")
    groups = tuple((_text(name), _count(n)) for name, n in content["groups"])
    tables = tuple(_table(each, [n for _, n in groups]) for each in content["tables"])
    if any(not each.dense for each in tables):
        raise ValueError("a table without a time of the dense network")
    if len({(each.runtime, each.batch_size) for each in tables}) != len(tables):
        raise ValueError("it holds a runtime and batch size twice")
    return LatencyProfile(
        _conditions(content["conditions"]), groups, tuple(_layer(each, groups) for each in content["layers"]), tables
    )


def _conditions(content: dict[str, Any]) -> Conditions:
    texts = {name: _text(content[name]) for name in ("device", "kind", "torch", "dtype")}
    runtime = content["onnxruntime"]
    return Conditions(
        **texts, n_threads=_count(content["n_threads"], 0), onnxruntime=None if runtime is None else _text(runtime)
    )


def _layer(content: dict[str, Any], groups: Sequence[tuple[str, int]]) -> LayerShape:
    into, out = (tuple((_count(p, 0), _count(n)) for p, n in content[key]) for key in ("into", "out"))
    ins, outs = map(_count, content["widths"])
    for total, shares in ((ins, into), (outs, out)):
        if any(position >= len(groups) for position, _ in shares) or total < sum(
            n * groups[position][1] for position, n in shares
        ):
            raise ValueError(f"layer {content['module']!r} has fewer channels than its groups")
    numbers = {name: _count(content[name], 0) for name in ("macs", "elements")}
    gone = tuple(_count(each, 0) for each in content["gone_with"])
    if any(position >= len(groups) for position in gone):
        raise ValueError(f"layer {content['module']!r} goes with a group that is not there")
    return LayerShape(
        _text(content["module"]),
        _text(content["signature"]),
        **numbers,
        widths=(ins, outs),
        into=into,
        out=out,
        gone_with=gone,
    )


def _table(content: dict[str, Any], sizes: Sequence[int]) -> TimeTable:
    samples, checks = (tuple(_sample(each, sizes) for each in content[key]) for key in ("samples", "checks"))
    return TimeTable(
        _text(content["runtime"]), _count(content["batch_size"]), tuple(map(_time, content["dense"])), samples, checks
    )


def _sample(content: dict[str, Any], sizes: Sequence[int]) -> Sample:
    kept = tuple(_count(each, 0) for each in content["kept"])
    if len(kept) != len(sizes) or any(k > n for k, n in zip(kept, sizes, strict=True)):
        raise ValueError("a sample keeps more filters than there are")
    return Sample(kept, *(_time(content[name]) for name in ("fraction", "low", "high")))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} stands where a text is expected")
    return value


def _count(value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} stands where a whole number of {least} or more is expected")
    return value


def _time(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} stands where a time is expected")
    return float(value)
