"""TensorBoard scalars of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Tracker:
    """Writes scalars under `tensorboard/`; a resumed run adds a file of its own, and steps written twice agree."""

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder))

    def scalars(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        """One point for each value, under `prefix/name`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        """Flush everything to disk."""
        self._writer.close()
