"""Criteria that are read off while a network trains: one set of hooks, no pass of their own.

Shapes: N filters, B images of a minibatch, S samples of a filter's activation (positions x channels x consumers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...envs.data.metrics import as_float64
from ...envs.networks.hooks import removed_after
from ...envs.surgery.filter_group import Cut, FilterGroup
from ...envs.surgery.masking import batch_dim, channel_dim

RUNNING = ("taylor", "mean_activation", "apoz")


@dataclass
class _Sums:
    """Of one group: over finished minibatches (N,), and of the one that is running."""

    taylor: Tensor
    activation: Tensor
    zeros: Tensor
    slope: Tensor | None = None  # (B, N)
    n_read: int = 0  # samples per image of the running minibatch
    n_samples: int = 0
    n_images: int = 0


@dataclass
class RunningScores:
    """What has been seen of every group, over all minibatches so far.

    Taylor is the mean over images of |mean over samples of activation x its gradient| (Molchanov et al., ICLR 2017,
    eq. 8), with the activations that the training saw; mean activation and APoZ are means over images and samples.
    """

    sums: dict[str, _Sums] = field(default_factory=dict)

    def column(self, group: str, criterion: str) -> Tensor:
        """(N,) float64 of a criterion in `RUNNING`; ValueError before the first minibatch."""
        self._finish()
        found = self.sums[group]
        if not found.n_images:
            raise ValueError("nothing was trained while the scores were collected")
        columns = {
            "taylor": found.taylor / found.n_images,
            "mean_activation": found.activation / found.n_samples,
            "apoz": found.zeros / found.n_samples,
        }
        return columns[criterion]

    def _finish(self) -> None:
        """Add the minibatch whose backward pass is over."""
        for found in self.sums.values():
            if found.slope is not None:
                # The loss is a mean over the minibatch, so each image's slope is B times too small in it.
                slope = found.slope * len(found.slope) / max(found.n_read, 1)
                found.taylor += slope.abs().sum(0).cpu()
                found.n_images += len(slope)
            found.slope, found.n_read = None, 0

    def _read(self, name: str, samples: Tensor) -> None:
        """(B, N, S) that a consumer reads."""
        found = self.sums[name]
        found.activation += samples.sum((0, 2)).cpu()
        found.zeros += (samples <= 0).sum((0, 2)).cpu()
        found.n_samples += samples.shape[0] * samples.shape[2]
        found.n_read += samples.shape[2]

    def _slide(self, name: str, slope: Tensor) -> None:
        """(B, N): summed activation x gradient of one consumer's call."""
        found = self.sums[name]
        found.slope = slope if found.slope is None else found.slope + slope


@contextmanager
def collecting(model: nn.Module, groups: Sequence[FilterGroup]) -> Iterator[RunningScores]:
    """Within the context every training step of `model` adds to the scores; the network is not changed.

    Forward passes without gradients are not counted.
    """
    scores = RunningScores()
    for group in groups:
        taylor, activation, zeros = torch.zeros(3, group.n_filters, dtype=torch.float64)
        scores.sums[group.name] = _Sums(taylor, activation, zeros)
    readers: dict[str, list[tuple[str, Cut]]] = {}
    for group in groups:
        for cut in group.consumers:
            readers.setdefault(cut.module, []).append((group.name, cut))

    def hooks() -> Iterator[RemovableHandle]:
        yield model.register_forward_pre_hook(lambda *_: scores._finish())
        for module, cuts in readers.items():
            yield model.get_submodule(module).register_forward_pre_hook(_reader(scores, cuts))

    with removed_after(hooks()):
        yield scores
        scores._finish()


def _reader(scores: RunningScores, cuts: Sequence[tuple[str, Cut]]) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not torch.is_grad_enabled() or not inputs[0].requires_grad:
            return None
        # A view of its own: its gradient is this consumer's alone, whoever else reads the same tensor.
        value = inputs[0].view_as(inputs[0])
        seen = value.detach()
        dims = batch_dim(module, value), channel_dim(module, value)
        for name, cut in cuts:
            scores._read(name, _samples(seen, dims, cut))

        def slopes(gradient: Tensor) -> None:
            for name, cut in cuts:
                scores._slide(name, (_samples(seen, dims, cut) * _samples(gradient, dims, cut)).sum(2))

        value.register_hook(slopes)
        return (value, *inputs[1:])

    return hook


def _samples(value: Tensor, dims: tuple[int, int], cut: Cut) -> Tensor:
    """(B, N, S) float64 of a consumer's input or its gradient."""
    rows = torch.as_tensor(cut.channels, device=value.device)
    picked = value.movedim(dims, (0, 1))[:, rows]  # (B, N, R, ...)
    return as_float64(picked.flatten(2))
