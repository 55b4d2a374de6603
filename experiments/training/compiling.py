"""A network by `torch.compile` while it trains, and as it is where that fails."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import Notice, first_line


class Compiled:
    """Calls a network compiled for batches of one size; for others, each of which would be compiled for, as it is.

    What does not compile runs as it is for ever, after one `Notice`.
    """

    def __init__(self, network: nn.Module, batch_size: int) -> None:
        self.network, self.batch_size = network, batch_size
        self.compiled: Any = torch.compile(network, dynamic=False)

    def __call__(self, images: Tensor) -> Any:
        """What the network answers to images (B, ...)."""
        if self.compiled is None or len(images) != self.batch_size:
            return self.network(images)
        try:
            return self.compiled(images)
        except Exception as error:  # a mistake of the network's own comes again below
            answer = self.network(images)
            self.compiled = None
            warnings.warn(
                f"{type(self.network).__name__} does not compile ({first_line(error)}); it runs operation by "
                "operation, which is slower and as right.",
                Notice,
                stacklevel=2,
            )
            return answer
