"""Three splits with fixed roles: fit trains weights, reward scores masks, report is opened once, at the end."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...errors import Notice, UserError
from .images import LabelledData, LabelledImages
from .leakage import check_leakage
from .objective import TOP1, Objective, objective_of, with_objective

Source = Literal["train", "test"]
ROLES = ("fit", "reward", "report")


@dataclass(frozen=True)
class Splits:
    """The three splits, and what is needed to draw the same ones again.

    `indices`: int64 positions inside the source of each role; `sources`: "train" or "test" of each role; `hashes`:
    sha256 of each role's positions, labels and (for images in memory) pixels.
    """

    fit: LabelledImages
    reward: LabelledImages
    report: LabelledImages
    indices: Mapping[str, np.ndarray]
    sources: Mapping[str, str]
    hashes: Mapping[str, str]

    @property
    def objective(self) -> Objective:
        """What answers are scored by, and what is minimised in training."""
        return objective_of(self.reward)

    @property
    def example(self) -> torch.Tensor:
        """One reward image, (1, C, H, W), to see what a network makes of it."""
        return self.examples(1)

    def examples(self, count: int) -> torch.Tensor:
        """The first reward images, (B, C, H, W), at most `count`, in the order in memory that every network takes."""
        return self.reward.batch(torch.arange(min(count, len(self.reward))))[0].contiguous()

    def summary(self) -> dict[str, dict[str, Any]]:
        """Source, number of images and hash of each role; only JSON types."""
        return {
            role: {"source": self.sources[role], "n_images": len(self.indices[role]), "sha256": self.hashes[role]}
            for role in ROLES
        }


def split(
    data: LabelledData, *, reward_from: Source, reward_size: int, seed: int, objective: Objective = TOP1
) -> Splits:
    """Draw the three splits at random with a generator of their own, so that sorted data is shuffled first.

    `data` comes from `keepdrop.from_datasets` or one of keepdrop's own sources.

    `reward_from="train"` (base trained here): the reward split is held out of the training images, report is the whole
    test set. `reward_from="test"` (checkpoint trained elsewhere on all training images, on which any reward would
    mislead): fit is all training images, reward `reward_size` of the test images and report the rest of them.
    `objective` goes with all three. A `reward_size` of all images or more takes half of them, with a `Notice`; so do
    images that two splits share (`leakage`). Raises UserError when a split would be empty, the test images are training
    images, or the targets are not what the objective needs.
    """
    if reward_from not in ("train", "test"):
        raise UserError(f"reward_from must be 'train' or 'test', got '{reward_from}'.")
    n_images = len(getattr(data, reward_from))
    if reward_size < 1:
        raise UserError(f"The reward split would be empty: reward_size={reward_size}; give 1 or more images.")
    if reward_size >= n_images:
        reward_size = _half(n_images, reward_size, reward_from)
    order = np.random.default_rng(seed).permutation(n_images).astype(np.int64)
    reward, rest = order[:reward_size], order[reward_size:]
    if reward_from == "train":
        indices = {"fit": rest, "reward": reward, "report": np.arange(len(data.test))}
    else:
        indices = {"fit": np.arange(len(data.train)), "reward": reward, "report": rest}
    sources = {"fit": "train", "reward": reward_from, "report": "test"}
    check_leakage(data, indices, sources)
    return splits_at(data, indices, sources, objective)


def _half(n_images: int, reward_size: int, reward_from: Source) -> int:
    """Half of the images, said aloud, where more are wanted than there are; UserError for a single image."""
    left = "fit" if reward_from == "train" else "report"
    if n_images < 2:
        raise UserError(f"The {left} split would be empty: there is 1 {reward_from} image; give at least 2.")
    warnings.warn(
        f"reward_size={reward_size} would take all {n_images} {reward_from} images and leave none for the {left} split;"
        f" {n_images // 2} are taken, half of them.",
        Notice,
        stacklevel=3,
    )
    return n_images // 2


def splits_at(
    data: LabelledData, indices: Mapping[str, np.ndarray], sources: Mapping[str, str], objective: Objective = TOP1
) -> Splits:
    """The splits at given positions (stored ones, or the user's own).

    Raises UserError for a split that is empty, lies outside its source, repeats an image or shares one with another.
    """
    for role in ROLES:
        _check_positions(role, indices[role], len(getattr(data, sources[role])))
    for one, other in combinations(ROLES, 2):
        if sources[one] == sources[other]:
            _check_disjoint(one, indices[one], other, indices[other], sources[one])
    parts, hashes = {}, {}
    for role in ROLES:
        source: LabelledImages = getattr(data, sources[role])
        positions = np.ascontiguousarray(indices[role], dtype=np.int64)
        whole = len(positions) == len(source) and bool((positions == np.arange(len(source))).all())
        parts[role] = with_objective(source if whole else source.select(torch.from_numpy(positions)), objective)
        if role == "reward":
            _check_room(parts[role])
        hashes[role] = hashlib.sha256(positions.tobytes() + parts[role].digest().encode()).hexdigest()
    return Splits(parts["fit"], parts["reward"], parts["report"], dict(indices), dict(sources), hashes)


def _check_room(reward: LabelledImages) -> None:
    """UserError where the reward images, which are judged again and again, do not fit into memory as float32."""
    with suppress(OSError, StopIteration):  # Linux says how much is left
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        wanted = 4 * len(reward) * math.prod(reward.image_shape)
        if wanted > free:
            raise UserError(
                f"The reward split of {len(reward)} images {reward.image_shape} takes {wanted / 2**30:,.1f} GiB of "
                f"memory, and {free / 2**30:,.1f} GiB are free;",
                python="lower Settings(reward_size=...).",
                typed="lower split.reward_size.",
            )


def _check_positions(role: str, positions: np.ndarray, n_images: int) -> None:
    if len(positions) == 0:
        raise UserError(f"The {role} split is empty; give it at least one image.")
    if positions.min() < 0 or positions.max() >= n_images:
        raise UserError(
            f"The {role} split names images {positions.min()}..{positions.max()}, but its source has {n_images}."
        )
    repeated = len(positions) - len(np.unique(positions))
    if repeated:
        raise UserError(f"The {role} split names {repeated} of its images twice; name each once.")


def _check_disjoint(one: str, ours: np.ndarray, other: str, theirs: np.ndarray, source: str) -> None:
    shared = np.intersect1d(ours, theirs)
    if len(shared):
        first = ", ".join(map(str, shared[:3]))
        raise UserError(
            f"The {one} and {other} splits share {len(shared)} {source} images (first: {first}); make them disjoint."
        )
