"""What is already known about masks that come again: answers image by image, so that no random stream is disturbed.

Shapes: M masks, N filters, B images.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from ..surgery.masking import MixKey


class MaskMemory:
    """Points (right, wrong) or unknown for every image, for the masks used last.

    Args:
        n_images: B; an entry takes so many bytes, or four times as many.
        size: entries kept; the one used longest ago goes first.
        dtype: of an image's points.
    """

    def __init__(self, n_images: int, size: int, dtype: torch.dtype = torch.bool) -> None:
        self.n_images, self.size = n_images, size
        self.dtype = torch.int8 if dtype == torch.bool else dtype
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, key: bytes) -> Tensor:
        """(B,) to read and fill: 1 right, 0 wrong (or points), -1 unknown. It outlives its place in here."""
        found = self._entries.pop(key, None)
        if found is None:
            found = torch.full((self.n_images,), -1, dtype=self.dtype)
        self._entries[key] = found
        while len(self._entries) > self.size:
            self._entries.popitem(last=False)
        return found


def mask_key(masks: Mapping[str, Tensor], mixes: Mapping[MixKey, Tensor] | None, index: int) -> bytes:
    """A digest of mask number `index` and of everything that is mixed under it."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(masks):
        digest.update(name.encode() + b"\0" + masks[name][index].cpu().contiguous().numpy().tobytes())
    for key in sorted(mixes or {}):
        digest.update("\0".join(key).encode() + b"\0" + (mixes or {})[key][index].cpu().contiguous().numpy().tobytes())
    return digest.digest()
