"""Channel labels: every activation carries, element by element, the number of the filter it came from.

Label 0 stands for what cannot be removed (input images, zero padding, results of operations we do not know). Two
filters that must go together are united; a filter that must stay is fixed, with the reason. Label `BLANK` stands for
what was made from nothing but a size (zeros, ones, random numbers): it takes the label of what it meets.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
BLANK = -1
MEETS_FIXED = "its filters meet channels that cannot be removed (the input, zero padding or a constant)"


class ChannelLabels:
    """A union-find forest over labels; unions and fixings are vectorised over arrays of labels."""

    def __init__(self) -> None:
        self._parent: list[int] = [0]
        self._reason: dict[int, str] = {}
        self._hint: dict[int, str] = {}

    def new(self, count: int) -> Ids:
        """`count` fresh labels."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count, dtype=np.int64)

    def find(self, label: int) -> int:
        """Representative of a label's class."""
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def reason(self, label: int) -> str | None:
        """Why the class of `label` must stay, or None if it may go."""
        return MEETS_FIXED if label == 0 else self._reason.get(self.find(label))

    def fix(self, labels: Ids | Tensor, reason: str) -> None:
        """Say that these filters must stay; the first reason is kept."""
        for label in np.unique(np.asarray(labels)):
            if label > 0:
                self._reason.setdefault(self.find(int(label)), reason)

    def hint(self, labels: Ids | Tensor, text: str) -> None:
        """Say what may be to blame if these filters turn out not to be removable; the first hint is kept."""
        for label in np.unique(np.asarray(labels)):
            if label > 0:
                self._hint.setdefault(int(label), text)

    @property
    def hints(self) -> dict[int, str]:
        """Every hint by the representative of its labels' class."""
        return {self.find(label): text for label, text in reversed(self._hint.items())}

    def unite(self, left: Ids | Tensor, right: Ids | Tensor, reason: str = MEETS_FIXED) -> None:
        """Tie labels pair by pair (broadcast); a label that is tied to label 0 is fixed."""
        pairs = np.stack(np.broadcast_arrays(np.asarray(left), np.asarray(right))).reshape(2, -1)
        for a, b in np.unique(pairs, axis=1).T.tolist():
            if BLANK in (a, b):
                continue
            if a and b:
                self._union(a, b)
            elif a or b:
                self._reason.setdefault(self.find(a or b), reason)

    def _union(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        if a == b:
            return
        self._parent[b] = a
        reason = self._reason.pop(b, None)
        if reason is not None:
            self._reason.setdefault(a, reason)


def varying(labels: Tensor) -> list[int]:
    """Dimensions along which labels differ; all others have stride 0 (see `compress`)."""
    return [dim for dim in range(labels.dim()) if labels.shape[dim] > 1 and labels.stride(dim) != 0]


def compact(labels: Tensor) -> Tensor:
    """The labels with every uniform dimension narrowed to 1."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def compress(labels: Tensor) -> Tensor:
    """The same labels with stride 0 along every dimension in which they do not differ."""
    shape = labels.shape
    labels = compact(labels)
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            if bool((labels == first).all()):
                labels = first
    return labels.expand(shape)


def combined(left: Tensor, right: Tensor) -> Tensor:
    """Where two labels meet: a filter's goes before 0, and 0 before `BLANK`."""
    return torch.where(left > 0, left, torch.where(right > 0, right, torch.maximum(left, right)))


def spread(ids: Ids, dim: int, shape: torch.Size) -> Tensor:
    """Labels of an activation of `shape` whose channels along `dim` have the labels `ids`."""
    view = [1] * len(shape)
    view[dim] = len(ids)
    return torch.from_numpy(np.array(ids)).view(view).expand(shape)


def per_channel(forest: ChannelLabels, labels: Tensor, dim: int) -> Ids:
    """One label per channel along `dim`; filters that share a channel there are united.

    Label 0 beside a filter in one channel (spatial zero padding by concatenation) fixes that filter.
    """
    small = compact(labels).movedim(dim, 0)
    rows = small.expand(labels.shape[dim], *small.shape[1:]).reshape(labels.shape[dim], -1).numpy()
    if rows.shape[1] > 1:
        forest.unite(rows[:, 1:], rows[:, :1])
    return np.maximum(rows.max(axis=1), 0)
