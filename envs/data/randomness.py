"""Random generators of Python, NumPy and torch, left as they were by what reads users' items or runs their networks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


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
