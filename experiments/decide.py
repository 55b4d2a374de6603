"""Who decides what a layer keeps: an agent being trained, a trained agent, or a criterion at given counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..envs.task import LayerTask


@dataclass(frozen=True)
class Decision:
    """A layer's decision before it is verified.

    Attributes:
        keep: (N,) bool, the decision itself.
        source: who decided ("agent", "trained agent", "l1", ...).
        alternatives: masks (N,) to fall back to.
        facts: JSON-able facts about the search (updates, mask-images, converged).
    """

    keep: Tensor
    source: str
    alternatives: tuple[Tensor, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Decider(Protocol):
    """Decides one layer; may write into the layer's working folder."""

    def __call__(self, layer: LayerTask, working: Path, seed: int) -> Decision:
        """Return the decision for `layer`."""
        ...


def observation_tensors(layer: LayerTask) -> dict[str, Tensor]:
    """What an agent sees of a layer, as tensors."""
    return {key: torch.from_numpy(value) for key, value in layer.observation.as_dict().items()}
