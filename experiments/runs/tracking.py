"""TensorBoard records of a run; docs/metrics.md explains every tag."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

CELL = 8  # pixels of one filter in the image of the kept filters
KEPT, DROPPED, NOTHING = (11, 102, 176), (207, 212, 217), (255, 255, 255)  # red, green, blue
HPARAMS = ("seed", "drop_bound", "order", "agent", "search", "policy", "reward", "recovery", "finetune", "evaluation")
FINAL = ("base_accuracy", "pruned_accuracy", "finetuned_accuracy", "pruned_macs", "pruned_params")


class Tracker:
    """Writes under `tensorboard/` from its first record on.

    A resumed run adds a file of its own, and steps written twice agree.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _writer(self) -> SummaryWriter:
        return SummaryWriter(str(self._folder))

    def scalars(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        """One point for each value, under `prefix/name`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """How values (N,) in [0, 1] are spread, in twenty bins."""
        self._writer.add_histogram(name, values.detach().cpu().numpy(), step, bins=np.linspace(0, 1, 21))

    def kept_filters(self, masks: Mapping[str, Sequence[bool]], step: int) -> None:
        """An image with one row per layer and one cell per filter: kept blue, dropped grey."""
        self._writer.add_image("schedule/kept_filters", kept_image(list(masks.values())), step, dataformats="HWC")

    def hparams(self, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """The settings that a sweep varies beside the final figures, for the HPARAMS tab."""
        chosen = dict(_flat({key: config[key] for key in HPARAMS if key in config}))
        final = {f"final/{key}": float(metrics[key]) for key in FINAL if metrics.get(key) is not None}
        # In the run's own folder: a subfolder would show up as a second run.
        self._writer.add_hparams(chosen, final, run_name=".")

    def close(self) -> None:
        """Flush everything to disk."""
        if "_writer" in vars(self):
            self._writer.close()


def kept_image(masks: Sequence[Sequence[bool]]) -> np.ndarray[Any, Any]:
    """Pixels (H, W, 3) uint8 of masks, one a row, white where a layer has no more filters."""
    cells = np.full((len(masks), max(map(len, masks), default=1), 3), NOTHING, np.uint8)
    for row, mask in enumerate(masks):
        keep = np.asarray(mask, bool)[:, None]
        cells[row, : len(mask)] = np.where(keep, np.array(KEPT, np.uint8), np.array(DROPPED, np.uint8))
    image = cells.repeat(CELL, 0).repeat(CELL, 1)
    image[CELL - 1 :: CELL] = image[:, CELL - 1 :: CELL] = NOTHING  # a line between cells
    return image


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | str | float | int]]:
    """Settings as the dotted names and plain values that TensorBoard takes."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, bool | str | float | int) else str(value)
