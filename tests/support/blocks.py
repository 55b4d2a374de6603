"""Networks of residual blocks as people write them, for tests of blocks that vanish."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Basic(nn.Module):
    """torchvision's: one ReLU for both places, the sum in place."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and n_in == n_out
        self.downsample = None if same else nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, n_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, n_in, 1, bias=False), nn.BatchNorm2d(n_in)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(x + self.bn3(self.conv3(out)))


class PreActivation(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(n_in), nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(n_out), nn.Conv2d(n_out, n_out, 3, 1, 1)
        self.shortcut = None if stride == 1 and n_in == n_out else nn.Conv2d(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class Inverted(nn.Module):
    """MobileNetV2's, whose convolutions stand in a `Sequential`."""

    def __init__(self, n: int, wider: int = 3) -> None:
        super().__init__()
        width = n * wider
        self.conv = nn.Sequential(
            nn.Conv2d(n, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(inplace=True),
            nn.Conv2d(width, n, 1, bias=False),
            nn.BatchNorm2d(n),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class SqueezeExcitation(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(n, n // 2, 1), nn.Conv2d(n // 2, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.fc2(gate))


class WithGate(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n)
        self.conv2, self.bn2, self.se = nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n), SqueezeExcitation(n)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.se(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class WithDropout(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1, self.act, self.drop = nn.Conv2d(n, n, 3, 1, 1), nn.GELU(), nn.Dropout(0.3)
        self.conv2, self.last_drop = nn.Conv2d(n, n, 3, 1, 1), nn.Dropout2d(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last_drop(self.conv2(self.drop(self.act(self.conv1(x)))))


class ConvNext(nn.Module):
    """Channels last in the branch: linear layers at positions, a LayerNorm, a scale."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(n, n, 5, 1, 2, groups=n), nn.LayerNorm(n)
        self.wide, self.act, self.narrow = nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n)
        self.scale = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.narrow(self.act(self.wide(out))) * self.scale).permute(0, 3, 1, 2)


class Dense(nn.Module):
    """DenseNet's: nothing is added, everything is kept beside."""

    def __init__(self, n_in: int, n: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(n_in, 2 * n, 1), nn.Conv2d(2 * n, n, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(F.relu(self.conv1(x)))], 1)


class SharedConv(nn.Module):
    """A branch whose convolution works for the shortcut as well."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(n, n, 3, 1, 1), nn.Conv2d(n, n, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(x) + self.conv2(F.relu(self.conv1(x)))


class Net(nn.Module):
    """A stem of 8 channels, the blocks, a mean and a linear layer; for images (B, 3, H, W)."""

    def __init__(self, *blocks: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


MAKERS = {
    "basic": lambda: Net(Basic(8, 8), Basic(8, 12, 2), Basic(12, 12), width=12),
    "bottleneck": lambda: Net(Bottleneck(8, 6), Bottleneck(8, 4)),
    "pre-activation": lambda: Net(PreActivation(8, 8), PreActivation(8, 12, 2), width=12),
    "inverted": lambda: Net(Inverted(8), Inverted(8)),
    "gate": lambda: Net(WithGate(8), WithGate(8)),
    "dropout": lambda: Net(WithDropout(8), WithDropout(8)),
    "convnext": lambda: Net(ConvNext(8), ConvNext(8)),
}
NONE_VANISH = {
    "plain": lambda: Net(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)),
    "concatenated": lambda: Net(Dense(8, 4), Dense(12, 4), width=16),
    "gate-alone": lambda: Net(SqueezeExcitation(8), nn.Conv2d(8, 8, 3)),
    "shared": lambda: Net(SharedConv(8), nn.Conv2d(8, 8, 3)),
}


def trained_looking(make, seed: int = 0) -> nn.Module:
    """The network with statistics and biases that are not 0 and 1, in evaluation mode."""
    torch.manual_seed(seed)
    model = make()
    for value in [*model.parameters(), *model.buffers()]:
        if value.dim() == 1 and value.is_floating_point():
            value.data = value.data + 0.3 * torch.rand(value.shape)
    return model.eval()
