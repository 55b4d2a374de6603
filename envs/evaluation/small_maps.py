"""A convolution over a map of a few pixels as one matrix product.

A 3x3 kernel on a 2x2 map, padded, multiplies zeros of the padding more often than pixels (20 of its 36 products a
channel), and libraries get little speed out of rows of two pixels. As a matrix from all pixels to all pixels it takes
16 products a channel, in one large product.

Shapes: B images, C input channels, K output channels, (H, W) map, (P, Q) map it becomes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Pair = Sequence[int]


def map_after(size: Pair, kernel: Pair, padding: Pair, stride: Pair, dilation: Pair) -> tuple[int, ...]:
    """(P, Q), what a convolution makes of a map of `size` (H, W)."""
    sides = zip(size, kernel, padding, stride, dilation, strict=True)
    return tuple((n + 2 * pad - gap * (k - 1) - 1) // step + 1 for n, k, pad, step, gap in sides)


def is_small(size: Pair, kernel: Pair, after: Pair) -> bool:
    """Whether the matrix has at most twice as many weights a channel as the kernel, so that it saves work."""
    return size[0] * size[1] * after[0] * after[1] <= 2 * kernel[0] * kernel[1]


def as_matrix(weight: Tensor, size: Pair, padding: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """The matrix (P Q K, H W C) that does on flattened channels_last maps what `weight` (K, C, h, w) does on maps."""
    n_out, n_in, *kernel = weight.shape
    after = map_after(size, kernel, padding, stride, dilation)
    taps = weight.permute(0, 2, 3, 1)
    matrix = weight.new_zeros(*after, n_out, *size, n_in)
    for p in range(after[0]):
        for q in range(after[1]):
            for i in range(kernel[0]):
                for j in range(kernel[1]):
                    y, x = p * stride[0] - padding[0] + i * dilation[0], q * stride[1] - padding[1] + j * dilation[1]
                    if 0 <= y < size[0] and 0 <= x < size[1]:
                        matrix[p, q, :, y, x] = taps[:, i, j]
    return matrix.view(after[0] * after[1] * n_out, -1)
