"""The three splits of a call from Python: how many reward images, and where they are kept."""

from __future__ import annotations

import dataclasses

import torch

from ...envs.data.datasets import images_in_memory
from ...envs.data.image_folder import FolderImages
from ...envs.data.images import ArrayImages, LabelledData
from ...envs.data.objective import TOP1, Objective, with_objective, without_objective
from ...envs.data.splits import Source, Splits, split

MOST_REWARD_IMAGES = 2000


def three_splits(
    data: LabelledData, reward_from: Source, reward_size: int | None, seed: int, objective: Objective = TOP1
) -> Splits:
    """Fit, reward and report; the reward images are read once and stay in memory, those of a folder as uint8.

    `reward_size` None takes a fifth of the source, at most 2,000 images. `objective` goes with all three.
    """
    if reward_size is None and reward_from in ("train", "test"):
        reward_size = min(MOST_REWARD_IMAGES, max(1, len(getattr(data, reward_from)) // 5))
    splits = split(data, reward_from=reward_from, reward_size=reward_size or 0, seed=seed, objective=objective)
    bare = without_objective(splits.reward)
    if isinstance(bare, ArrayImages):
        return splits
    if isinstance(bare, FolderImages):
        return dataclasses.replace(splits, reward=with_objective(bare.resident(), objective))
    images, labels = bare.batch(torch.arange(len(bare)))
    in_memory = images_in_memory(images, labels, "reward", bare.n_classes)
    return dataclasses.replace(splits, reward=with_objective(in_memory, objective))
