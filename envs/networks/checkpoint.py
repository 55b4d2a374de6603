"""Checkpoints: weights in and out of a network, without ever unpickling a user's file."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from ...atomic import write_atomically
from ...errors import UserError
from ...remote import local, named
from .weights_in_parts import made_whole

WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "net", "weights")
EMA_KEYS = ("ema", "model_ema", "state_dict_ema", "ema_state_dict")  # taken where nothing else is there
WRAPPERS = ("module", "_orig_mod")  # DataParallel and torch.compile
AVERAGED = ("ema_model", "ema", "model_ema")
COUNTER = "num_batches_tracked"
PROFILED = ("total_ops", "total_params")  # counters that thop leaves in every module
FOREIGN = ("n_averaged", *PROFILED)  # n_averaged is of AveragedModel
ValueT = TypeVar("ValueT")
N_NAMED = 3  # an error names this many keys, then a count


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, key: str | None = None) -> None:
    """Load the weights in `path` into `model`, exactly: every key and every shape must fit.

    Reads torch files (`weights_only=True`) and `.safetensors`, at a path or a URL. `key` names the entry of the file
    that holds the state dict; without it `state_dict`, `model_state_dict`, `model`, `net` and `weights` are unwrapped,
    or else the usual names of averaged weights, or the one entry that fits the model. Where the names do not agree as
    they are, `module` and `_orig_mod` are taken out of them on both sides, then the name under which another module
    holds the network; masks of `torch.nn.utils.prune` are multiplied in, and the weights that weight norm or spectral
    norm makes are made. Missing `num_batches_tracked` counters keep the model's value.

    Raises UserError, with the model untouched, when the file is missing, damaged, needs unpickling, holds no state
    dict, does not fit the model (the first keys and shapes are named) or holds NaN.
    """
    place, expected = local(path), model.state_dict()
    with named(place, path):
        state = _fitted(_state_dict_in(read_tensors(place), key, place, expected), expected, place)
        missing = [name for name in expected if name not in state]
        state |= {name: expected[name] for name in missing if name.endswith(COUNTER)}
        _check_fit(state, expected, place)
    model.load_state_dict(state)


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state dict of `model` as safetensors; an older file stays intact unless the new one is complete."""
    # Clones, because safetensors refuses tensors that share memory (tied weights).
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_atomically(path, safetensors.torch.save(tensors))


def hash_state(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of the state dict: equal only where all weights are bitwise equal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_tensors(path: Path) -> Any:
    """The content of a torch or safetensors file, read without unpickling; UserError where that is impossible."""
    if not path.exists():
        raise UserError(f"Checkpoint '{path}' does not exist; check the path.")
    if not path.is_file():
        raise UserError(f"Checkpoint '{path}' is not a file; give the path of a .pt, .th or .safetensors file.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # settings beside the weights; it does nothing
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_unpickling_sentence(path, str(error))) from error
    except PermissionError as error:
        raise UserError(f"Checkpoint '{path}' cannot be read: permission denied.") from error
    # A damaged file makes torch's reader raise almost anything, from EOFError to UnicodeDecodeError.
    except Exception as error:
        if "TorchScript" in str(error):
            raise UserError(
                f"Checkpoint '{path}' is a TorchScript archive, which holds code beside the weights; save the weights "
                "alone with torch.save(torch.jit.load(path).state_dict(), another_path)."
            ) from error
        raise UserError(_damaged_sentence(path)) from error


def _damaged_sentence(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"Checkpoint '{path}' is a pointer of Git LFS, not the weights; fetch them with git lfs pull."
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"Checkpoint '{path}' is a web page, not the weights: the download failed; download the file again."
    return f"Checkpoint '{path}' ({size} bytes) is truncated or not a torch or safetensors file; copy it again."


def _unpickling_sentence(path: Path, message: str) -> str:
    """torch raises one class both for forbidden content and for garbage; its message tells them apart."""
    if not any(word in message for word in ("GLOBAL", "global", "Unsupported class", "not allowed")):
        return _damaged_sentence(path)
    return (
        f"Checkpoint '{path}' holds pickled Python objects, which can run any code while loading, so it is refused; "
        "save only the weights with torch.save(model.state_dict(), path)."
    )


def _state_dict_in(content: Any, key: str | None, path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mapping from names to tensors inside `content`."""
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            found = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
            raise UserError(f"Checkpoint '{path}' has no entry '{key}'; it holds: {found[:200]}.")
        content = content[key]
    else:
        found = next((content[name] for name in (*WRAPPER_KEYS, *EMA_KEYS) if _has_mapping(content, name)), content)
        content = found if _as_tensors(found) else _entry_that_fits(content, expected, path)
    if tensors := _as_tensors(content):
        return tensors
    held = f", only {', '.join(map(str, content))[:200]}" if isinstance(content, Mapping) and content else ""
    raise UserError(
        f"Checkpoint '{path}' holds no state dict (a mapping from names to tensors) that fits{held}; "
        "save one with torch.save(model.state_dict(), path)."
    )


def _as_tensors(content: Any) -> dict[str, Tensor]:
    """A state dict; {} for anything else."""
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        return {}
    return {str(name): value for name, value in content.items()}


def _entry_that_fits(content: Any, expected: Mapping[str, Tensor], path: Path) -> Any:
    """The one entry of a file whose names are the model's; `content` where there is none."""
    entries = {str(name): _as_tensors(value) for name, value in content.items()} if isinstance(content, Mapping) else {}
    fitting = {name: each for name, each in entries.items() if each and _fits(_fitted(each, expected, path), expected)}
    plain = [name for name in fitting if "ema" not in name] or list(fitting)
    if len(plain) > 1:
        raise UserError(
            f"Checkpoint '{path}' holds {len(plain)} networks that fit ({', '.join(plain)}); save the state dict of "
            "one alone."
        )
    return fitting[plain[0]] if plain else content


def _has_mapping(content: Any, name: str) -> bool:
    return isinstance(content, Mapping) and isinstance(content.get(name), Mapping)


def _fitted(state: dict[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors under the model's names, wherever wrappers on either side are all that is between them.

    Names that agree are left alone. What cannot be brought together keeps its bare name, for `_check_fit` to say so.
    """
    if _fits(state, expected):
        return state
    ours = {_bare(name): name for name in expected}
    theirs = made_whole({_bare(name): tensor for name, tensor in state.items()}, ours)
    theirs = {name: tensor for name, tensor in theirs.items() if name in ours or not name.endswith(FOREIGN)}
    if len(ours) < len(expected) or len(theirs) > len(state):
        return state
    if not _fits(theirs, ours):
        ours, theirs = _without_parents(ours, theirs, path)
    return {ours.get(name, name): tensor for name, tensor in theirs.items()}


def _fits(state: Collection[str], expected: Collection[str]) -> bool:
    """Whether the names are the same, apart from counters that old files lack."""
    missing = [name for name in expected if name not in state]
    return all(name in expected for name in state) and all(name.endswith(COUNTER) for name in missing)


def _bare(name: str) -> str:
    """A name without the parts that wrappers put in it, at the front or between."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _without_parents(
    ours: dict[str, str], theirs: dict[str, Tensor], path: Path
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Both sides without the name under which another module (a LightningModule, an EMA) holds the network."""
    parents = list(dict.fromkeys(name.partition(".")[0] for name in theirs if "." in name))
    fitting = {parent: part for parent in parents if _fits(part := _part(theirs, parent), ours)}
    if len(fitting) > 1 and not any(parent in fitting for parent in AVERAGED):
        raise UserError(
            f"Checkpoint '{path}' holds {len(fitting)} networks that fit ({', '.join(fitting)}); save the state dict "
            "of one alone."
        )
    if fitting:
        return ours, fitting[next((parent for parent in AVERAGED if parent in fitting), next(iter(fitting)))]
    parent = next(iter(ours), "").partition(".")[0]
    inner = _part(ours, parent)
    return (inner, theirs) if len(inner) == len(ours) and _fits(theirs, inner) else (ours, theirs)


def _part(names: Mapping[str, ValueT], parent: str) -> dict[str, ValueT]:
    """What stands under one parent, without its name."""
    start = f"{parent}."
    return {name.removeprefix(start): value for name, value in names.items() if name.startswith(start)}


def _check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    wrong = (("missing", missing), ("not in the model", unexpected), ("of another shape", shapes))
    parts = [f"{len(names)} {label} ({_first(names)})" for label, names in wrong if names]
    if parts:
        raise UserError(f"Checkpoint '{path}' is for another architecture; keys: {'; '.join(parts)}.")
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"Checkpoint '{path}' holds NaN or infinite values in {_first(broken)}; its training diverged.")


def _first(names: list[str]) -> str:
    rest = len(names) - N_NAMED
    return ", ".join(names[:N_NAMED]) + (f" and {rest} more" if rest > 0 else "")
