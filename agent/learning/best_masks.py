"""The best distinct masks seen so far.

Shape suffixes: M masks, N filters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoredMask:
    """A mask and the reward it got.

    Attributes:
        mask: (N,), bool.
        reward: of its first evaluation.
    """

    mask: Tensor
    reward: float


class BestMasks:
    """Keeps the top_k distinct masks by reward; of equal rewards the earlier one goes first.

    Args:
        top_k: at least 1.
    """

    def __init__(self, top_k: int) -> None:
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, but at least 1 mask must be remembered")
        self.top_k = top_k
        self.masks: list[ScoredMask] = []

    def add(self, masks_MN: Tensor, rewards_M: Tensor) -> None:
        """Consider M scored masks."""
        for mask, reward in zip(masks_MN.cpu(), rewards_M.tolist(), strict=True):
            if not any(torch.equal(mask, known.mask) for known in self.masks):
                self.masks.append(ScoredMask(mask.clone(), reward))
        # Python's sort is stable, so ties keep the order in which they were found.
        self.masks = sorted(self.masks, key=lambda scored: -scored.reward)[: self.top_k]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {"masks": [scored.mask for scored in self.masks], "rewards": [scored.reward for scored in self.masks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        self.masks = [ScoredMask(m.clone(), r) for m, r in zip(state["masks"], state["rewards"], strict=True)]
