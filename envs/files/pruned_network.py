"""A pruned network as data: `model.safetensors` and `architecture.json`, no pickle, no class definitions.

`architecture.json` says how the dense network is made, which of its channels were kept (numbered as in the dense
network), and what every tensor looks like; `load_pruned` makes the dense network, cuts it and fills in the weights. A
probe, the network's answer to one fixed input of shape (1, ...), tells apart what shapes cannot (strides, activations).
Format version 2 has `branches` besides, the residual branches that vanished; a network without any is of version 1.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ...atomic import write_atomically
from ...errors import UserError
from ...remote import local, named, writing
from ...strict_json import parse_json
from ..data.packing import packed_batch
from ..networks import built_in, segmentation
from ..networks.answers import as_called, as_given
from ..networks.checkpoint import PROFILED
from ..networks.inputs import mapped
from ..networks.module_kinds import Inputs
from ..networks.unwrapping import is_lazy, plain_network
from ..networks.weights_in_parts import normalised_in
from ..surgery.cutting import cut_channels
from ..surgery.filter_group import Branch
from ..surgery.kept_channels import KeptChannels
from ..surgery.slicing import width
from ..surgery.whole_blocks import VALUE, find_module
from .probe import check_probe, probe_input, probe_of
from .renamed import current_target

FORMAT_VERSION, WITH_BRANCHES = 1, 2
SIGNED = ("format_version", "constructor", "kept", "widths", "tensors", "weights_sha256", "probe")
BRANCHES = "branches"
LARGEST = 10**6  # no width or number of classes of keepdrop's own networks comes near
WEIGHTS, ARCHITECTURE = "model.safetensors", "architecture.json"
BUILT_IN = {
    f"keepdrop.envs.networks.{made.__module__.rpartition('.')[2]}.{made.__name__}": made
    for made in (
        *(built_in.small_cnn, built_in.vgg16_bn, built_in.cifar_resnet, built_in.cifar_resnet18),
        *(segmentation.fcn, segmentation.segnet),
    )
}


def save_pruned(
    model: nn.Module,
    folder: str | Path,
    *,
    kept: KeptChannels,
    constructor: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    example: Inputs | None = None,
) -> None:
    """Write a pruned network into `folder` (made if missing, or a URL).

    Args:
        model: the pruned, perhaps fine-tuned network.
        folder: where `model.safetensors` and `architecture.json` go. Each is written under another name first and then
            renamed; a pair of different origin is refused when loading.
        kept: its channels in terms of the dense network.
        constructor: {"_target_": dotted name, argument: value, ...} of the dense network (Hydra's form).
        facts: anything else worth keeping (JSON).
        input_shape: (1, C, H, W) of an image; with it the file holds the network's answer to a fixed input, which
            loading compares: a constructor that differs in no shape is noticed.
        example: instead of `input_shape`, an input, of which only shapes and types matter: a tensor, a tuple of
            positional or a mapping of keyword arguments.

    Raises UserError if `constructor` or `facts` is not JSON.
    """
    example = as_called(model, example)
    model, packing = as_given(model), None
    if isinstance(example, Tensor):
        input_shape = (1, *example.shape[1:])
    elif example is not None:
        several, packing = packed_batch(mapped(example, lambda value: value[:1]))
        input_shape = several.shape
    own = _without_profile(model.state_dict())
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in own.items()}
    weights = save_tensors(tensors)
    core: dict[str, Any] = {
        "format_version": WITH_BRANCHES if kept.branches else FORMAT_VERSION,
        "constructor": None if constructor is None else dict(constructor),
        "kept": kept.as_lists(),
        "widths": {name: dict(axes) for name, axes in kept.widths.items()},
        "tensors": {name: _described(value) for name, value in tensors.items()},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "probe": None if input_shape is None else probe_of(model, input_shape, packing),
    }
    if kept.branches:
        core[BRANCHES] = [asdict(branch) for branch in kept.branches]
    try:
        whole = {**core, "checksum": _checksum(core), "versions": _versions(), "facts": dict(facts or {})}
        text = json.dumps(whole, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"The constructor and facts of a pruned network must be JSON ({error}).") from error
    with writing(folder) as place:
        write_atomically(place / WEIGHTS, weights)
        write_atomically(place / ARCHITECTURE, text.encode())


def load_pruned(folder: str | Path, constructor: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Rebuild a pruned network, in evaluation mode.

    Args:
        folder: what `save_pruned` wrote; or its URL.
        constructor: makes the dense network; not needed for keepdrop's own networks. No other stored constructor is
            called: a file does not decide what code runs.

    Raises UserError for anything missing, damaged or mixed up, and for a constructor that makes another network: it
    names the first module or tensor that does not fit.
    """
    place = local(folder, (WEIGHTS, ARCHITECTURE).__contains__)
    with named(place, folder):
        core = read_architecture(place)
        weights = _read(place / WEIGHTS)
        if hashlib.sha256(weights).hexdigest() != core["weights_sha256"]:
            raise UserError(f"{place / WEIGHTS} is damaged, or belongs to another {ARCHITECTURE}; restore both files.")
        try:
            tensors = load_tensors(weights)
        except Exception as error:
            raise UserError(f"{place / WEIGHTS} is not a safetensors file ({error}).") from error
    dense = _dense(core["constructor"], constructor, tensors, core["probe"])
    _check_widths(dense, core["kept"], core["widths"])
    branches = _branches(core.get(BRANCHES, []))
    model = cut_channels(dense, core["kept"], branches, [_constant_of(each, core["tensors"]) for each in branches])
    _fill(model, tensors, core["tensors"])
    check_probe(model.eval(), core["probe"])
    return model


def read_architecture(folder: str | Path) -> dict[str, Any]:
    """The contents of `architecture.json`, checked in form; UserError if it is missing or damaged."""
    path = Path(folder) / ARCHITECTURE
    of_run = Path(folder) / "pruned"
    if not path.exists() and (of_run / ARCHITECTURE).exists():
        raise UserError(f"{str(folder)!r} is the folder of a run; give its pruned network, {str(of_run)!r}.")
    content = _read(path)
    try:
        core = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({str(error)[:120]}); restore it.") from error
    if not isinstance(core, dict) or core.get("format_version") not in (FORMAT_VERSION, WITH_BRANCHES):
        came = core.get("format_version") if isinstance(core, dict) else type(core).__name__
        raise UserError(f"{path} has format version {came!r}, expected {FORMAT_VERSION} or {WITH_BRANCHES}.")
    signs = (*SIGNED, BRANCHES) if core["format_version"] == WITH_BRANCHES else SIGNED
    _check_form(path, core, signs)
    signed = {key: core[key] for key in signs}
    if core.get("checksum") != _checksum(signed):
        raise UserError(f"{path} is damaged or was edited (its checksum does not fit); restore it.")
    return core


def _check_form(path: Path, core: Mapping[str, Any], signs: Sequence[str]) -> None:
    missing = [key for key in signs if key not in core]
    if missing:
        raise UserError(f"{path} is damaged: {missing[0]!r} is missing; restore it.")
    nested = (core["kept"], core["widths"])
    proper = all(isinstance(each, dict) for each in (*nested, core["tensors"]))
    if not proper or not all(isinstance(axes, dict) for each in nested for axes in each.values()):
        raise UserError(f"{path} is damaged: 'kept', 'widths' or 'tensors' is not sorted by module; restore it.")


def _branches(stored: Any) -> tuple[Branch, ...]:
    """The vanished branches of a file: lists of names of modules, and nothing that decides what code runs."""
    found = []
    for each in stored if isinstance(stored, list) else [None]:
        known: dict[str, Any] = each if isinstance(each, dict) else {}
        lists: list[Any] = [known.get(key) for key in ("chain", "inside", "heads")]
        proper = all(isinstance(names, list) and all(type(name) is str and name for name in names) for names in lists)
        if not proper or not lists[0] or not isinstance(known.get("written"), bool):
            raise UserError(f"The file's {BRANCHES!r} are damaged; restore it.")
        chain, inside, heads = (tuple(names) for names in lists)
        found.append(Branch(chain, inside, heads, known["written"]))
    return tuple(found)


def _constant_of(branch: Branch, described: Mapping[str, Any]) -> Tensor | None:
    """Room for a branch's constant as the file describes it; None for one that vanished inside of another."""
    place = described.get(f"{branch.tail}.{VALUE}")
    shape = place.get("shape") if isinstance(place, dict) else None
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or not 0 < shape[0] <= LARGEST:
        return None
    return torch.zeros(shape)


def _dense(
    stored: Any, constructor: Callable[[], nn.Module] | None, tensors: Mapping[str, Tensor], probe: Any
) -> nn.Module:
    """The dense network, without wrappers (`plain_network`).

    One of keepdrop's own has no storage yet, so that no number in a file can ask for too much.
    """
    device: AbstractContextManager[Any] = nullcontext()
    if constructor is None:
        target = stored.get("_target_") if isinstance(stored, dict) else None
        target = current_target(target) if isinstance(target, str) else None
        if target not in BUILT_IN:
            raise UserError(
                f"The file names {target!r} as the constructor of the dense network, which is not called from a file; "
                "pass it yourself: load_pruned(folder, constructor)."
            )
        maker, kwargs = BUILT_IN[target], {key: value for key, value in stored.items() if key != "_target_"}
        if max(_numbers(kwargs), default=0) > LARGEST or max(_numbers(kwargs.get("depth")), default=0) > len(tensors):
            raise UserError(f"The file asks for an absurdly large network ({str(kwargs)[:80]}); restore it.")
        constructor, device = lambda: maker(**kwargs), torch.device("meta")
    try:
        with device:
            dense = constructor()
    except Exception as error:
        raise UserError(f"The constructor of the dense network fails ({type(error).__name__}: {error}).") from error
    if not isinstance(dense, nn.Module):
        raise UserError(f"The constructor of the dense network returned a {type(dense).__name__}, expected a module.")
    example = probe_input(probe) if probe is not None and is_lazy(dense) else None
    return plain_network(dense, example, normalised_in(tensors))[0]


def _numbers(value: Any) -> list[float]:
    """Every number inside nested containers."""
    if isinstance(value, dict | list):
        return [number for each in (value.values() if isinstance(value, dict) else value) for number in _numbers(each)]
    return [value] if isinstance(value, int | float) else []


def _check_widths(dense: nn.Module, kept: Mapping[str, Any], widths: Mapping[str, Any]) -> None:
    """A wider network can be cut to the same shapes: it must have been as wide as the one that was pruned."""
    for name, axes in kept.items():
        for axis in axes:
            ours, theirs = width(find_module(dense, name), axis), widths.get(name, {}).get(axis)
            if ours != theirs:
                raise UserError(
                    f"The constructor's network does not fit the file: {name!r} has {ours} {axis!r} channels, but had "
                    f"{theirs} before pruning."
                )


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    floating = {value.dtype for value in tensors.values() if value.is_floating_point()}
    if len(floating) == 1:
        model.to(floating.pop())
    own, tensors = _without_profile(model.state_dict()), _without_profile(tensors)
    for name in [*own, *tensors]:
        ours = _described(own[name]) if name in own else "nothing"
        theirs = _described(tensors[name]) if name in tensors else "nothing"
        if ours != theirs or theirs != described.get(name):
            raise UserError(
                f"The constructor's network does not fit the file: {name!r} is {_words(ours)} after pruning, "
                f"but {_words(theirs)} in the file."
            )
    if any(value.is_meta for value in own.values()):
        model.to_empty(device="cpu")
    model.load_state_dict(dict(tensors), strict=False)  # every name was compared above


def _without_profile(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's own tensors: a profiler that ran on it may have left counters in every module."""
    return {name: value for name, value in tensors.items() if name.rpartition(".")[2] not in PROFILED}


def _described(value: Tensor) -> dict[str, Any]:
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _words(described: Any) -> str:
    return described if isinstance(described, str) else f"{described['dtype']} {tuple(described['shape'])}"


def _checksum(core: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(core, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("keepdrop")
    except PackageNotFoundError:
        own = "unknown"
    return {
        "keepdrop": own,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
