"""Trained agents on disk: a folder with `policy.safetensors` and `facts.json`.

The weights file carries the facts in its header as well, so it is complete by itself and replaced in one
step. `facts.json` is the copy to read; if a save was interrupted between the two, the header counts.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..atomic import write_atomically
from ..errors import UserError
from ..remote import local, named, writing
from .policies.group_policy import GroupPolicy
from .policies.layer_matrix import LayerMatrixPolicy
from .policies.network import NetworkPolicy
from .policies.policy import Policy
from .policies.set_policy import SetPolicy

FORMAT_VERSION = 1
LARGEST_WEIGHT = 1e9  # far above what training leads to; beyond it scores overflow
WEIGHTS, FACTS = "policy.safetensors", "facts.json"
POLICIES: dict[str, Callable[..., Any]] = {
    "SetPolicy": SetPolicy,
    "LayerMatrixPolicy": LayerMatrixPolicy,
    "NetworkPolicy": NetworkPolicy,
    "GroupPolicy": GroupPolicy,
}
LIBRARIES = ("keepdrop", "torch", "numpy", "gymnasium", "safetensors")


class AgentMismatch(UserError):  # noqa: N818 - the name says what is wrong, as a user reads it
    """A saved agent that cannot be read, or was trained for something else."""


@dataclass(frozen=True)
class SavedAgent:
    """A trained agent.

    Attributes:
        policy: rebuilt, on the CPU, in eval mode.
        facts: what was saved with it.
        folder: where it was read from.
    """

    policy: Any
    facts: Mapping[str, Any]
    folder: Path


def save_agent(folder: Path | str, policy: Policy | NetworkPolicy | GroupPolicy, facts: Mapping[str, Any]) -> None:
    """Write an agent; an older one in the folder is replaced as a whole or stays.

    Args:
        folder: made if missing; or a URL.
        policy: an `nn.Module` with JSON-able `kwargs` that rebuild it.
        facts: JSON-able; customary are command, config, seed, group, n_filters, n_weights,
            statistic_names, base_hash, base_accuracy, reward_split_hash, reward_curve, best_step.
            Format version, policy kind and arguments and library versions are added.

    Raises:
        UserError: the disk is full or not writable; the old agent is intact.
        TypeError: facts that JSON cannot hold.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in _module(policy).state_dict().items()}
    full = {
        "format_version": FORMAT_VERSION,
        "libraries": library_versions(),
        "policy": {"kind": type(policy).__name__, "kwargs": policy.kwargs},
        **facts,
    }
    header = json.dumps(full, allow_nan=False)
    data = save_tensors(state, metadata={"facts": header, "sha256": _digest(header, state)})
    readable = {**full, "weights_sha256": hashlib.sha256(data).hexdigest()}
    with writing(folder) as place:
        write_atomically(place / WEIGHTS, data)
        write_atomically(place / FACTS, (json.dumps(readable, indent=2, allow_nan=False) + "\n").encode())


def load_agent(folder: Path | str, policies: Mapping[str, Callable[..., Policy]] | None = None) -> SavedAgent:
    """Read an agent; no code in its files is run.

    Args:
        folder: what `save_agent` wrote; or a URL.
        policies: constructors of the caller's own policies by class name, beside keepdrop's.

    Raises:
        AgentMismatch: no agent there, a damaged file, a newer format, an unknown policy, or weights that
            do not fit it.
    """
    place = local(folder, (WEIGHTS, FACTS).__contains__)
    with named(place, folder):
        return _loaded(place, policies)


def _loaded(folder: Path, policies: Mapping[str, Callable[..., Policy]] | None) -> SavedAgent:
    data = _read(folder)
    header = _header(folder, data)
    facts = _facts(folder, header, data)
    version = facts.get("format_version")
    if version != FORMAT_VERSION:
        raise AgentMismatch(
            f"the agent in {folder} has format version {version}, but this keepdrop reads {FORMAT_VERSION}; "
            "train it again or install the version named in its facts.json"
        )
    state = _tensors(folder, data)
    policy = _rebuild(folder, facts, state, {**POLICIES, **(policies or {})})
    _load_weights(folder, policy, state, header)
    return SavedAgent(policy, facts, folder)


def check_agent(agent: SavedAgent, **expected: Any) -> None:
    """Compare an agent's facts with what it is to be used for, before it is used.

    Args:
        agent: as loaded.
        expected: values by fact name, such as group, statistic_names, n_filters, n_weights.

    Raises:
        AgentMismatch: a fact that is missing or differs, with both values.
    """
    for name, wanted in expected.items():
        wanted = list(wanted) if isinstance(wanted, tuple) else wanted
        if name not in agent.facts:
            raise AgentMismatch(f"the agent in {agent.folder} does not say its {name}, but {wanted!r} is needed")
        if agent.facts[name] != wanted:
            raise AgentMismatch(
                f"the agent in {agent.folder} was trained for {name} {agent.facts[name]!r}, but is to be used for "
                f"{wanted!r}; choose a matching agent or train one"
            )


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries an agent depends on, for its facts."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def _digest(facts: str, state: Mapping[str, Tensor]) -> str:
    """sha256 over the facts and the tensors, which stands in the weights file beside them."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(folder: Path) -> bytes:
    try:
        return (folder / WEIGHTS).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise AgentMismatch(f"there is no agent in {folder}: {WEIGHTS} is missing; give an agent's folder") from None
    except OSError as error:
        raise AgentMismatch(f"cannot read {folder / WEIGHTS}: {error.strerror or error}") from error


def _facts(folder: Path, header: Mapping[str, str], data: bytes) -> dict[str, Any]:
    embedded = _parse(folder, WEIGHTS, header["facts"])
    try:
        text = (folder / FACTS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return embedded
    except UnicodeDecodeError:
        raise AgentMismatch(f"{folder / FACTS} is not text in UTF-8; restore it, or delete it") from None
    facts = _parse(folder, FACTS, text)
    if facts.pop("weights_sha256", None) != hashlib.sha256(data).hexdigest():
        return embedded
    return facts


def _header(folder: Path, data: bytes) -> dict[str, str]:
    # A safetensors file is 8 bytes of header length, the header in JSON, the tensors.
    try:
        length = int.from_bytes(data[:8], "little")
        found = json.loads(data[8 : 8 + length])["__metadata__"]
        return {**found, "facts": str(found["facts"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise AgentMismatch(
            f"{folder / WEIGHTS} is damaged or was not written by keepdrop; train the agent again"
        ) from None


def _parse(folder: Path, name: str, text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        raise AgentMismatch(
            f"the facts in {folder / name} are not JSON; restore the file, or delete facts.json"
        ) from None
    if not isinstance(facts, dict):
        raise AgentMismatch(
            f"the facts in {folder / name} are not a JSON object; restore the file or delete facts.json"
        )
    return facts


def _rebuild(
    folder: Path, facts: Mapping[str, Any], state: Mapping[str, Tensor], policies: Mapping[str, Callable[..., Policy]]
) -> Policy:
    described = facts.get("policy")
    described = described if isinstance(described, dict) else {}
    kind, kwargs = described.get("kind"), described.get("kwargs")
    if not isinstance(kind, str) or kind not in policies or not isinstance(kwargs, dict):
        known = ", ".join(sorted(policies))
        raise AgentMismatch(f"the agent in {folder} uses the policy {kind!r}, but known are {known}; give its class")
    try:
        # Without storage at first: numbers in a file must not ask for memory before they fit the file's own tensors.
        with torch.device("meta") if policies[kind] is POLICIES.get(kind) else nullcontext():
            shown = policies[kind](**kwargs)
        _check_shapes(folder, shown, state)
        return shown if not _on_meta(shown) else policies[kind](**kwargs)
    except AgentMismatch:
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError, IndexError, MemoryError) as error:
        raise AgentMismatch(f"the {kind} in {folder} cannot be rebuilt from its facts: {error}") from error


def _on_meta(policy: Policy) -> bool:
    return any(value.is_meta for value in _module(policy).state_dict().values())


def _tensors(folder: Path, data: bytes) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = load_tensors(data)
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise AgentMismatch(f"{folder / WEIGHTS} is damaged: {error}; train the agent again") from error
    return state


def _check_shapes(folder: Path, policy: Policy, state: Mapping[str, Tensor]) -> None:
    wanted = _module(policy).state_dict()
    for key in sorted(wanted.keys() | state.keys()):
        have = tuple(state[key].shape) if key in state else "missing"
        want = tuple(wanted[key].shape) if key in wanted else "not part of it"
        if have != want:
            raise AgentMismatch(
                f"weights in {folder} do not fit its policy: {key} is {have}, but the policy has {want}"
            )


def _load_weights(folder: Path, policy: Policy, state: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    if "sha256" in header and header["sha256"] != _digest(header["facts"], state):  # not in files of version 0.1.0
        raise AgentMismatch(
            f"{folder / WEIGHTS} is damaged (its sha256 differs); copy it again, or train the agent again"
        )
    for key, tensor in state.items():
        if not bool((tensor.double().abs() <= LARGEST_WEIGHT).all()):  # NaN is not, either
            raise AgentMismatch(
                f"the agent in {folder} has NaN, infinite or absurdly large weights in {key}; train it again"
            )
    _module(policy).load_state_dict(state)
    _module(policy).eval()


def _module(policy: Policy | NetworkPolicy | GroupPolicy) -> nn.Module:
    if not isinstance(policy, nn.Module):
        raise TypeError(f"a policy is an nn.Module, this one is a {type(policy).__name__}")
    return policy
