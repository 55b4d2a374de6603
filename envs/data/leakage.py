"""Leakage: images that more than one split holds, exactly or as near copies (a difference hash, then a comparison).

Of every image a thumbnail of 8 x 9 points is made, and of that 64 bits: is a point darker than the next one in its row?
(dHash, N. Krawetz, "Kind of Like That", 2013). Images that agree in one of four bands of these bits are compared by
their thumbnails, so that a lookup takes linear time, and equal ones pixel by pixel.

Deviations: bands instead of a Hamming distance, which would compare all pairs; thumbnails instead of the bits decide.

Shapes: n images, C channels, P points of a thumbnail.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...errors import Notice, UserError
from .images import ArrayImages, LabelledData, LabelledImages
from .items import evenly
from .randomness import randomness_restored

POINTS = {1: (65,), 2: (8, 9), 3: (4, 4, 5)}  # sides of the thumbnail of a signal, an image, a volume
MOST_READ = 2000  # images of a split that lie in no memory and have to be read
NEAR = 0.995  # correlation of two thumbnails from which on images may be near copies
NEAR_PIXELS = 0.95  # correlation of their pixels that they need as well
NEAR_SHARE = 0.005  # fraction of near copies below which nothing is said: any data set of things alike has some
SAME_SHARE = 0.5  # fraction of exact copies from which on a split is no other split
PER_BAND = 4  # images that an image is compared with for each band


@dataclass(frozen=True)
class Copies:
    """Images of one split that another holds too: how many of `n_compared` are `exact` or only `near` copies.

    `first` is the position of the first exact copy, else of the first near one; None without any.
    """

    n_compared: int
    exact: int = 0
    near: int = 0
    first: int | None = None


def check_leakage(data: LabelledData, indices: Mapping[str, np.ndarray], sources: Mapping[str, str]) -> None:
    """UserError where at least half of the test images are training images; a `Notice` that counts fewer copies.

    Splits of one source, `sources[role]`, are compared as well, at their positions `indices[role]`, for a notice only.
    """
    found = {name: Thumbnails.of(getattr(data, name)) for name in ("train", "test")}
    shared = copies(found["train"], found["test"])
    if shared.exact >= SAME_SHARE * shared.n_compared > 0:
        raise UserError(
            f"{shared.exact} of {shared.n_compared} test images are training images too (first: {shared.first}); the "
            "splits overlap, so no accuracy on them would mean anything: give test images of their own."
        )
    _tell(shared, "training images", "test images")
    for one, other in combinations(indices, 2):
        if sources[one] == sources[other]:
            parts = [found[sources[role]].at(indices[role]) for role in (one, other)]
            _tell(copies(*parts), f"images of the {one} split", f"images of the {other} split")


def _tell(found: Copies, ours: str, theirs: str) -> None:
    near = found.near if found.near > NEAR_SHARE * found.n_compared else 0
    if found.exact or near:
        kinds = [f"{found.exact} exactly"] * bool(found.exact) + [f"{near} as near copies"] * bool(near)
        warnings.warn(
            f"Of {found.n_compared} {theirs} some are {ours} too: {' and '.join(kinds)} (first: {found.first}); what "
            "is measured on them may be too good by their share.",
            Notice,
            stacklevel=4,
        )


@dataclass(frozen=True)
class Thumbnails:
    """Thumbnails (n, P) float32, of mean 0 and length 1, of the images at `positions` (n,) of a source.

    Blank images are left out; of images that have to be read 2,000 are, evenly spread.
    """

    images: LabelledImages
    values: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, images: LabelledImages) -> Thumbnails:
        """Those of a whole source."""
        bare = getattr(images, "images", images)
        positions = np.array(evenly(len(images), len(images) if isinstance(bare, ArrayImages) else MOST_READ))
        with randomness_restored():
            parts = np.array_split(positions, -(-len(positions) // 512))
            values = torch.cat([_thumbnail(images.batch(torch.from_numpy(rows))[0]) for rows in parts])
        values = values - values.mean(1, keepdim=True)
        length = values.norm(dim=1, keepdim=True)
        seen = (length[:, 0] > 1e-6).numpy()
        return cls(images, (values / length.clamp_min(1e-6)).numpy()[seen], positions[seen])

    def at(self, positions: np.ndarray) -> Thumbnails:
        """Those of some positions alone."""
        chosen = np.isin(self.positions, positions)
        return Thumbnails(self.images, self.values[chosen], self.positions[chosen])

    def pixels(self, rows: np.ndarray) -> Tensor:
        """The images themselves, (rows, points) float32."""
        with randomness_restored():
            return self.images.batch(torch.from_numpy(self.positions[rows]))[0].flatten(1)


def copies(ours: Thumbnails, theirs: Thumbnails) -> Copies:
    """How many images of `theirs` are in `ours` too."""
    if ours.images.image_shape != theirs.images.image_shape or not len(ours.values) or not len(theirs.values):
        return Copies(0)
    best, match = _closest(ours.values, theirs.values)
    exact, near = np.zeros((2, len(best)), dtype=bool)
    # Signals that are no copies are often as alike as near copies of an image are: beats of one heart.
    least = NEAR if len(ours.images.image_shape) == 3 else 1 - 1e-5
    candidates = np.flatnonzero(best > least)
    for start in range(0, len(candidates), 256):
        rows = candidates[start : start + 256]
        one, two = ours.pixels(match[rows]), theirs.pixels(rows)
        exact[rows] = (one == two).all(1).numpy()
        near[rows] = (_correlation(one, two) > NEAR_PIXELS).numpy() & ~exact[rows] & (least == NEAR)
    hits = np.flatnonzero(exact if exact.any() else near)
    first = int(theirs.positions[hits[0]]) if len(hits) else None
    return Copies(len(best), int(exact.sum()), int(near.sum()), first)


def _correlation(one: Tensor, two: Tensor) -> Tensor:
    return functional.cosine_similarity(one - one.mean(1, keepdim=True), two - two.mean(1, keepdim=True))


def _thumbnail(images: Tensor) -> Tensor:
    """(n, C, ...) -> (n, P): channels added up with weights of their own, then means over parts of each side."""
    # By the golden ratio: no two channels weigh the same, as the planes of a chess board must not.
    weights = 1 + (torch.arange(images.shape[1]) * 0.618034).frac()
    grey = torch.tensordot(images, weights, dims=([1], [0]))[:, None]
    sides: Any = POINTS[grey.dim() - 2]
    if len(sides) == 1:
        return functional.adaptive_avg_pool1d(grey, sides[0]).flatten(1)
    pool = functional.adaptive_avg_pool2d if len(sides) == 2 else functional.adaptive_avg_pool3d
    return pool(grey, sides).flatten(1)


def _bands(thumbnails: np.ndarray, n_columns: int) -> np.ndarray:
    """Four bands of difference bits, (n, 4) uint16, of thumbnails (n, P)."""
    rows = thumbnails.reshape(len(thumbnails), -1, n_columns)
    bits = (rows[:, :, 1:] > rows[:, :, :-1]).reshape(len(rows), 64)
    return np.packbits(bits, axis=1).view(np.uint16)


def _closest(mine: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of `other` (m, P) the highest correlation with those of `mine` that share a band, (m,), and which."""
    n_columns = {math.prod(sides): sides[-1] for sides in POINTS.values()}[mine.shape[1]]
    ours, theirs = _bands(mine, n_columns), _bands(other, n_columns)
    keys = [(ours.view(np.uint64)[:, 0], theirs.view(np.uint64)[:, 0])]
    keys += [(ours[:, band], theirs[:, band]) for band in range(4)]
    best, match = np.full(len(other), -1.0, dtype=np.float32), np.zeros(len(other), dtype=np.int64)
    for one, two in keys:
        order = np.argsort(one, kind="stable")
        for place in np.searchsorted(one[order], two) + np.arange(PER_BAND)[:, None]:
            rows = np.flatnonzero(place < len(order))
            rows = rows[one[order[place[rows]]] == two[rows]]
            chosen = order[place[rows]]
            alike = np.einsum("np,np->n", mine[chosen], other[rows])
            better = alike > best[rows]
            best[rows[better]], match[rows[better]] = alike[better], chosen[better]
    return best, match
