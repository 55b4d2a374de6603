"""Files that are either the old ones or the new ones, never a piece of either."""

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step; on any failure, a full disk included, the old one stays.

    Raises:
        OSError: as the system reported it.
    """
    # A fixed name: what a killed writer left behind is overwritten by the next one.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save a training state (tensors and plain values) atomically."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomically(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; nothing is unpickled but tensors and plain values.

    Raises:
        ValueError: the file is not such a state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path} is not a readable training state; delete it to start this agent anew") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a training state; delete it to start anew")
    return state
