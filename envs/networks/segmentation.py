"""Segmentation networks that come with keepdrop: an FCN and a SegNet, both with a VGG-like encoder.

(B, C, H, W) -> one logit per class and pixel, (B, n_classes, H, W). H and W are multiples of 2 per stage of `widths`.
Traceable by `torch.fx`, and without in-place activations, as those of `built_in`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError
from .built_in import initialised

WIDTHS = (16, 32, 64)


class FCN(nn.Module):
    """A fully convolutional network with skips: each stage's features are scored, and the scores added up the pyramid.

    Two 3x3 convolutions with batch normalisation and 2x2 max pooling per stage, a 1x1 convolution that scores what each
    stage pooled, bilinear upsampling by 2 from score to score. Keys: `stages.{i}.*`, `scores.{i}`. Source: Long et al.
    2015 (arXiv 1411.4038), FCN-8s; batch normalisation is not in it, and its upsampling is learned.
    """

    def __init__(self, n_classes: int = 11, in_channels: int = 3, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        ends = [in_channels, *widths]
        pairs = list(zip(ends, widths, strict=False))
        self.stages = nn.ModuleList(
            nn.Sequential(*_conv(fan_in, width), *_conv(width, width), nn.MaxPool2d(2)) for fan_in, width in pairs
        )
        self.scores = nn.ModuleList(nn.Conv2d(width, n_classes, 1) for width in widths)
        initialised(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, n_classes, H, W)."""
        scores = []
        features = images
        for stage, score in zip(self.stages, self.scores, strict=True):
            features = stage(features)
            scores.append(score(features))
        total = scores.pop()
        for finer in reversed(scores):
            total = _doubled(total) + finer
        return _doubled(total)


class SegNet(nn.Module):
    """An encoder that remembers where its maxima were, and a decoder that puts features back there.

    Two 3x3 convolutions with batch normalisation per stage on either side; 2x2 max pooling with indices, unpooling with
    the same ones. Channel i of what is unpooled goes where channel i of the encoder was largest, so that encoder and
    decoder filters go together. Keys: `encoder.{i}.*`, `decoder.{i}.*` (coarsest first), `score`. Source:
    Badrinarayanan et al. 2017 (arXiv 1511.00561).
    """

    def __init__(self, n_classes: int = 11, in_channels: int = 3, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        ends = [in_channels, *widths]
        pairs = list(zip(ends, widths, strict=False))
        self.encoder = nn.ModuleList(
            nn.Sequential(*_conv(fan_in, width), *_conv(width, width)) for fan_in, width in pairs
        )
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)
        back = [(width, max(fan_in, widths[0])) for fan_in, width in reversed(pairs)]
        self.decoder = nn.ModuleList(
            nn.Sequential(*_conv(width, width), *_conv(width, narrower)) for width, narrower in back
        )
        self.score = nn.Conv2d(widths[0], n_classes, 1)
        initialised(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, n_classes, H, W)."""
        features, places = images, []
        for stage in self.encoder:
            features, where = self.pool(stage(features))
            places.append(where)
        for stage in self.decoder:
            features = stage(self.unpool(features, places.pop()))
        return self.score(features)


def fcn(n_classes: int = 11, in_channels: int = 3, widths: Sequence[int] = WIDTHS) -> FCN:
    """A small FCN; see `FCN`. Raises UserError for no or non-positive widths."""
    return FCN(n_classes, in_channels, _checked("fcn", widths))


def segnet(n_classes: int = 11, in_channels: int = 3, widths: Sequence[int] = WIDTHS) -> SegNet:
    """A small SegNet; see `SegNet`. Raises UserError for no, non-positive or falling widths."""
    if list(widths) != sorted(widths):
        raise UserError(f"segnet needs widths that do not fall, got widths={tuple(widths)}.")
    return SegNet(n_classes, in_channels, _checked("segnet", widths))


def _checked(network: str, widths: Sequence[int]) -> Sequence[int]:
    if not widths or min(widths) < 1:
        raise UserError(f"{network} needs at least one width of 1 or more, got widths={tuple(widths)}.")
    return widths


def _conv(fan_in: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(fan_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


def _doubled(scores: Tensor) -> Tensor:
    return F.interpolate(scores, scale_factor=2.0, mode="bilinear", align_corners=False)
