"""Passes of the part behind the frontier under masks: one mask after another, or all of them in one batch.

Shapes: M masks, N filters, B images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.objective import Objective
from ..networks.batch_size import chunks
from ..surgery.masking import MixKey
from .masked_network import Frontier, MaskedNetwork

Masks = Mapping[str, Tensor]
Mixes = Mapping[MixKey, Tensor]


@dataclass
class MaskPasses:
    """How masks are run.

    Attributes:
        network: whose suffix runs.
        objective: what answers are judged by.
        batch: images a pass, times masks where these share it; halved where a GPU's memory is not enough.
    """

    network: MaskedNetwork
    objective: Objective
    batch: int

    def points(self, frontier: Frontier, labels: Tensor, masks: Masks, mixes: Mixes) -> Tensor:
        """Points (M, B) of the frontier's images under M masks, on the CPU."""
        n_masks = len(next(iter(masks.values())))
        run = self._in_one_batch if self.network.stacks and n_masks > 1 else self._one_by_one
        found = torch.empty(n_masks, len(labels), dtype=self.objective.dtype)
        while True:
            try:
                run(found, frontier, labels, masks, mixes)
                return found
            except torch.OutOfMemoryError:
                if self.batch <= 2:
                    raise
                self.batch //= 2

    def _one_by_one(self, found: Tensor, frontier: Frontier, labels: Tensor, masks: Masks, mixes: Mixes) -> None:
        for index, own in enumerate(found):
            with self.network.masked(masks, index, mixes) as run:
                for rows in chunks(len(labels), self.batch):
                    outputs = run(tuple(value[rows] for value in frontier))
                    own[rows] = self.objective.points(outputs, labels[rows]).cpu()

    def _in_one_batch(self, found: Tensor, frontier: Frontier, labels: Tensor, masks: Masks, mixes: Mixes) -> None:
        run, n_masks = self.network.together(masks, mixes), len(found)
        for rows in chunks(len(labels), self.batch // n_masks):
            logits = run(tuple(value[rows] for value in frontier))
            targets = labels[rows].expand(n_masks, *labels[rows].shape).flatten(0, 1)
            found[:, rows] = self.objective.points(logits.flatten(0, 1), targets).view(n_masks, -1).cpu()
