"""One seed for a run, another for each of its stages: a resumed stage draws what an uninterrupted one would."""

import hashlib


def derive_seed(seed: int, *names: str) -> int:
    """A seed in [0, 2**31) that depends on the run's seed and the stage's name alone."""
    text = "/".join([str(seed), *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
