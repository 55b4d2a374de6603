"""Train and eval modes of a network, restored afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
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


def random_states() -> dict[str, object]:
    """Where the generators of Python, NumPy and torch are: another state means that numbers were drawn."""
    torchs = torch.random.get_rng_state().numpy().tobytes()
    return {"Python's random": random.getstate(), "numpy.random": str(np.random.get_state()), "torch": torchs}


@contextmanager
def randomness_restored(seed: int | None = None) -> Iterator[None]:
    """Random numbers drawn inside (on the CPU) leave the generators of Python, NumPy and torch as they were.

    With a `seed` all three start from it.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
                torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
