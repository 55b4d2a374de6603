"""Exponential moving average (EMA) of a network's weights while it trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RAMP = 10  # steps: after t of them the decay is at most (1 + t) / (RAMP + t)


class Average:
    """The moving average of a model's state, batch-norm statistics included; integers are copied.

    A decay of .999 remembers a thousand steps, more than a short training has. So it rises with the steps, as in
    TensorFlow's `ExponentialMovingAverage(num_updates=...)`: the average spans about the last tenth of them, until the
    decay that was given is less. The weights that a network was cut with are forgotten within a few steps.

    The running statistics of a batch normalisation are averaged with the weights, of which they then describe the
    average: to measure them anew on training images was no better on the whole (docs/results.md).

    Args:
        model: being trained; the average begins with its state.
        decay: share that is kept at every step, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors: dict[str, Tensor] = {name: each.detach().clone() for name, each in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: float | Tensor) -> None:
        """Take in the model as it is after step 0, 1, ...; a number, or a tensor () on the device (CUDA graphs)."""
        given = [(self.tensors[name], value) for name, value in self.model.state_dict().items()]
        averaged = [pair for pair in given if pair[0].is_floating_point() or pair[0].is_complex()]
        for kept, value in given:
            if not (kept.is_floating_point() or kept.is_complex()):
                kept.copy_(value)
        if isinstance(step, Tensor):
            share = 1 - ((1 + step) / (RAMP + step)).clamp(max=self.decay)
            mine, theirs = ([pair[side] for pair in averaged] for side in (0, 1))
            torch._foreach_add_(mine, torch._foreach_mul(torch._foreach_sub(theirs, mine), share))
            return
        for kept, value in averaged:
            kept.lerp_(value, 1 - min(self.decay, (1 + step) / (RAMP + step)))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's state and the average, in place; a second call takes it back, bit for bit."""
        for name, value in self.model.state_dict().items():
            mine = value.detach().clone()
            value.copy_(self.tensors[name])
            self.tensors[name].copy_(mine)  # in place: a CUDA graph writes to where the average was
