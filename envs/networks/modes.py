"""Train and eval modes of a network, restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_restored(*models: nn.Module | None) -> Iterator[None]:
    """Whatever happens to train/eval modes inside, every module has its own again afterwards. None is skipped."""
    modes = [(module, module.training) for model in models if model is not None for module in nn.Module.modules(model)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Eval mode inside, every module's own mode again afterwards. None is skipped."""
    with modes_restored(*models):
        for model in models:
            if model is not None:
                model.eval()
        yield
