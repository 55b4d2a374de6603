"""CNNs that come with keepdrop: a small default for 8x8 images, VGG-16-BN, ResNets and ResNet-18 for CIFAR.

All are traceable by `torch.fx` and use no in-place activation, so a value cached at any node stays what it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError

NetworkT = TypeVar("NetworkT", bound=nn.Module)
VGG16_LAYOUT: tuple[int | str, ...] = (
    *(64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool"),
    *(512, 512, 512, "pool", 512, 512, 512, "pool"),
)


def small_cnn(n_classes: int = 10, in_channels: int = 1, widths: Sequence[int] = (16, 16, 32, 32, 64)) -> nn.Sequential:
    """Plain conv-BN-ReLU network for small images: (B, in_channels, H, W) -> logits (B, n_classes).

    One 3x3 convolution for each entry of `widths` (modules `conv1`, `bn1`, `relu1`, ...), 2x2 max pooling after every
    second one except the last, then global average pooling and one linear layer. With five widths H and W must be at
    least 4. Raises UserError for no or non-positive widths.
    """
    if not widths or min(widths) < 1:
        raise UserError(f"small_cnn needs at least one width of 1 or more, got widths={tuple(widths)}.")
    layers: list[tuple[str, nn.Module]] = []
    for number, (fan_in, width) in enumerate(zip([in_channels, *widths], widths, strict=False), start=1):
        layers.append((f"conv{number}", nn.Conv2d(fan_in, width, 3, padding=1, bias=False)))
        layers.append((f"bn{number}", nn.BatchNorm2d(width)))
        layers.append((f"relu{number}", nn.ReLU()))
        if number % 2 == 0 and number < len(widths):
            layers.append((f"pool{number}", nn.MaxPool2d(2)))
    layers += [("average", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    layers.append(("linear", nn.Linear(widths[-1], n_classes)))
    return initialised(nn.Sequential(OrderedDict(layers)))


class CifarVGG(nn.Module):
    """VGG with batch normalisation and one linear layer: (B, C, H, W) -> logits (B, n_classes); H, W at least 32.

    Source: Simonyan and Zisserman 2015 (arXiv 1409.1556), configuration D; the CIFAR variant replaces the three fully
    connected layers by one.
    """

    def __init__(self, layout: Sequence[int | str] = VGG16_LAYOUT, n_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for item in layout:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(width, item, 3, padding=1, bias=False), nn.BatchNorm2d(item), nn.ReLU()]
            width = item
        self.features = nn.Sequential(*layers)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, n_classes)
        initialised(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, n_classes)."""
        return self.classifier(self.average(self.features(images)).flatten(1))


def vgg16_bn(n_classes: int = 10, in_channels: int = 3, width: int = 64) -> CifarVGG:
    """VGG-16 with batch normalisation for 32x32 images: 13 convolutions (`features.*`) and one linear layer.

    `width` is the number of filters of the first convolution and scales all others: 64 is VGG-16, 16 a quarter of its
    width. Raises UserError for a width below 1.
    """
    _check_width("vgg16_bn", width)
    layout = [item if isinstance(item, str) else item * width // 64 for item in VGG16_LAYOUT]
    return CifarVGG(layout, n_classes, in_channels)


class TwoConvolutions(nn.Module):
    """What the blocks of these ResNets share: two 3x3 convolutions, and a `shortcut` that a class of its own gives.

    (B, in_width, H, W) -> (B, width, H/stride, W/stride).
    """

    shortcut: Callable[[Tensor], Tensor]

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, in_width, H, W) -> features (B, width, H/stride, W/stride)."""
        inner = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(images))


class BasicBlock(TwoConvolutions):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 2016, arXiv 1512.03385, option A).

    Where the block halves the resolution or widens, the shortcut takes every `stride`-th pixel and pads zero channels,
    half of them before and half after the old ones.
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__(in_width, width, stride)
        self.stride = stride
        self.padding = ((width - in_width) // 2, width - in_width - (width - in_width) // 2)

    def shortcut(self, images: Tensor) -> Tensor:
        """The identity, subsampled and zero-padded to the block's output shape where that differs."""
        if self.stride > 1:
            images = images[:, :, :: self.stride, :: self.stride]
        if any(self.padding):
            images = F.pad(images, (0, 0, 0, 0, *self.padding))
        return images


class CifarResNet(nn.Module):
    """ResNet for CIFAR: (B, C, H, W) -> logits (B, n_classes), three stages of `n_blocks` blocks of the given widths.

    Keys: `conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear`. Source: He et al. 2016 (arXiv 1512.03385),
    section 4.2, with the parameter-free shortcut (option A).
    """

    def __init__(
        self, n_blocks: int, n_classes: int = 10, in_channels: int = 3, widths: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(BasicBlock, widths[0], widths[0], n_blocks, stride=1)
        self.layer2 = _stage(BasicBlock, widths[0], widths[1], n_blocks, stride=2)
        self.layer3 = _stage(BasicBlock, widths[1], widths[2], n_blocks, stride=2)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[2], n_classes)
        initialised(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, n_classes)."""
        features = F.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.linear(self.average(features).flatten(1))


def cifar_resnet(
    depth: int = 20, n_classes: int = 10, in_channels: int = 3, widths: Sequence[int] = (16, 32, 64)
) -> CifarResNet:
    """ResNet-`depth` for 32x32 images, depth = 6n + 2 (20, 32, 44, 56, 110); see `CifarResNet`.

    Raises UserError for another depth, or for widths that are not three non-decreasing positive numbers.
    """
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"A CIFAR ResNet has depth 6n + 2 (20, 32, 44, 56, 110, ...), got depth={depth}.")
    if len(widths) != 3 or list(widths) != sorted(widths) or widths[0] < 1:
        raise UserError(f"A CIFAR ResNet needs three non-decreasing positive widths, got widths={tuple(widths)}.")
    return CifarResNet((depth - 2) // 6, n_classes, in_channels, widths)


class ProjectedBlock(TwoConvolutions):
    """Two 3x3 convolutions and a shortcut that is projected where the shape changes (He et al. 2016, option B).

    The projection is a 1x1 convolution with batch normalisation (`shortcut.0`, `shortcut.1`); elsewhere `shortcut` is
    an empty nn.Sequential, the identity.
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__(in_width, width, stride)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_width != width:
            projection = nn.Conv2d(in_width, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))


class CifarResNet18(nn.Module):
    """ResNet-18 for 32x32 images: (B, C, H, W) -> logits (B, n_classes), four stages of two blocks.

    Keys: `conv1, bn1, layer{1,2,3,4}.{i}.{conv1,bn1,conv2,bn2,shortcut.0,shortcut.1}, linear`, those of the CIFAR form
    in public use: a 3x3 first convolution without pooling in place of the 7x7 one of ImageNet. Source: He et al. 2016
    (arXiv 1512.03385), table 1, with projections (option B). At width 64: 11,173,962 parameters for 10 classes.
    """

    def __init__(self, n_classes: int = 10, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(ProjectedBlock, width, width, 2, stride=1)
        self.layer2 = _stage(ProjectedBlock, width, 2 * width, 2, stride=2)
        self.layer3 = _stage(ProjectedBlock, 2 * width, 4 * width, 2, stride=2)
        self.layer4 = _stage(ProjectedBlock, 4 * width, 8 * width, 2, stride=2)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, n_classes)
        initialised(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, n_classes)."""
        features = F.relu(self.bn1(self.conv1(images)))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        return self.linear(self.average(features).flatten(1))


def cifar_resnet18(n_classes: int = 10, in_channels: int = 3, width: int = 64) -> CifarResNet18:
    """ResNet-18 for 32x32 images; `width` filters in the first stage, twice as many in each later one.

    64 is ResNet-18 (11.2 million parameters), 16 a quarter of its width. Raises UserError for a width below 1.
    """
    _check_width("cifar_resnet18", width)
    return CifarResNet18(n_classes, in_channels, width)


def _check_width(network: str, width: int) -> None:
    if not isinstance(width, int) or width < 1:
        raise UserError(f"{network} needs a whole number of filters of 1 or more, got width={width}: 64 is full width.")


def _stage(
    block: Callable[[int, int, int], nn.Module], in_width: int, width: int, n_blocks: int, stride: int
) -> nn.Sequential:
    first = block(in_width, width, stride)
    return nn.Sequential(first, *(block(width, width, 1) for _ in range(n_blocks - 1)))


@torch.no_grad()
def initialised(model: NetworkT) -> NetworkT:
    """He-normal convolutions (fan out, for ReLU); linear layers and BN keep torch's defaults."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
