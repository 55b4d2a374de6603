"""Small hand-written networks, one for every way in which channels can hang together."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune


class ResidualStream(nn.Module):
    """Two blocks on one stream, the second with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner1, self.outer1 = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.inner2, self.outer2 = nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Conv2d(6, 12, 3, padding=1)
        self.projection = nn.Conv2d(8, 12, 1, stride=2)
        self.linear = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.bn1(self.outer1(F.relu(self.inner1(x)))) + x)
        x = F.relu(self.outer2(F.relu(self.inner2(x))) + self.projection(x))
        return self.linear(x.mean((2, 3)))


class PadShortcut(nn.Module):
    """The zero-padded shortcut of CIFAR ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(6, 10, 3, stride=2, padding=1), nn.Conv2d(10, 10, 3, padding=1)
        self.bn = nn.BatchNorm2d(10)
        self.linear = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = F.relu(self.bn(self.outer(F.relu(self.inner(x)))) + short)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Concat(nn.Module):
    """Branches of different widths side by side, read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.left, self.right = nn.Conv2d(5, 7, 1), nn.Conv2d(5, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.head, self.other = nn.Conv2d(16, 6, 3), nn.Conv2d(16, 6, 3)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.bn(torch.cat([self.left(x), x, self.right(x)], 1)))
        return self.linear((self.head(x) * self.other(x)).mean((2, 3)))


class Depthwise(nn.Module):
    """Inverted residual with a channel multiplier in one of its depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand, self.deep = nn.Conv2d(6, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.bn = nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 6, 1)
        self.wide = nn.Conv2d(6, 18, 3, padding=1, groups=6)
        self.linear = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = self.project(F.hardswish(self.bn(self.deep(F.relu6(self.expand(x)))))) + x
        return self.linear(F.relu(self.wide(x)).mean((2, 3)))


class Grouped(nn.Module):
    """ResNeXt's grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.grouped = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 16, 3, padding=1, groups=4)
        self.bn = nn.BatchNorm2d(16)
        self.restore = nn.Conv2d(16, 6, 1)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.grouped(F.relu(self.reduce(x)))))
        return self.linear(F.relu(self.restore(x)).mean((2, 3)))


class Reused(nn.Module):
    """One convolution and its normalisation run three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.again, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 1)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = F.relu(self.bn(self.again(x)))
        y = self.inner(x)
        return self.linear(F.relu(y).mean((2, 3))) + self.linear(F.sigmoid(y).amax((2, 3)))


class Chunked(nn.Module):
    """Halves of a tensor that multiply (GLU), and halves that go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.gated, self.split = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(6, 10, 3, padding=1)
        self.left, self.right = nn.Conv2d(5, 4, 1), nn.Conv2d(5, 4, 1)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gated(x).chunk(2, dim=1)
        c, d = self.split(a * torch.sigmoid(b)).relu().chunk(2, 1)
        return self.linear((self.left(c) + self.right(d)).relu().mean((2, 3)))


class Shuffled(nn.Module):
    """Hand-written channel shuffle, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.head = nn.Conv2d(12, 8, 3, padding=1)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        b, c, h, w = x.shape
        x = x.view(b, 3, c // 3, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.linear(F.relu(self.head(x)).mean((2, 3)))


class Flattened(nn.Module):
    """Feature map flattened into linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.hidden, self.linear = nn.Linear(6 * 16, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.linear(F.relu(self.hidden(x.flatten(1))))


class Viewed(nn.Module):
    """The tutorials' LeNet: `view` behind a map larger than 1x1, which knows one order in memory alone."""

    def __init__(self, in_channels: int = 3, n_classes: int = 4) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(in_channels, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8 * 2 * 2, 12), nn.Linear(12, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(self.flat(x))))

    def flat(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


class ViewedBySize(Viewed):
    """The same with the size written down."""

    def flat(self, x: Tensor) -> Tensor:
        return x.view(-1, 8 * 2 * 2)


class Brought(nn.Module):
    """What tutorials' networks bring along: lazy layers, an activation and a lock kept on self, a pruning mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.LazyConv2d(6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.linear, self.lock = nn.LazyLinear(10), threading.Lock()
        prune.random_unstructured(self.conv2, "weight", 0.3)

    def forward(self, x: Tensor) -> Tensor:
        self.features = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.linear(F.max_pool2d(F.relu(self.conv2(self.features)), 2).flatten(1))


def parallel() -> nn.DataParallel:
    """`Brought`, as several GPUs train it."""
    return nn.DataParallel(Brought())


class Noisy(Viewed):
    """Its dropout is never switched off (a functional one without `training`)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.05))


class MaxOverChannels(nn.Module):
    """Pooling over channels by a MaxPool3d, which takes no channels-last images."""

    def __init__(self, in_channels: int = 3, n_classes: int = 4) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(in_channels, 6, 3, padding=1), nn.Conv2d(6, 12, 3, padding=1)
        self.pool = nn.MaxPool3d((2, 1, 1))
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(8)
        self.conv3, self.linear = nn.Conv2d(6, 8, 3), nn.Linear(8, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.relu(self.bn2(self.conv3(x))).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze-and-excite, by 1x1 convolutions and by linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.down, self.up = nn.Linear(10, 5), nn.Linear(5, 10)
        self.linear = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.relu(self.middle(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return self.linear((x * gate[:, :, None, None]).mean((2, 3)))


class Decoder(nn.Module):
    """Transposed convolutions, plain and grouped, to a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up, self.bn = nn.ConvTranspose2d(6, 8, 2, stride=2), nn.BatchNorm2d(8)
        self.grouped = nn.ConvTranspose2d(8, 12, 3, groups=2)
        self.deep = nn.ConvTranspose2d(12, 12, 3, groups=12)
        self.linear = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.up(F.relu(self.down(x)))))
        x = F.relu(self.deep(F.leaky_relu(self.grouped(x))))
        return self.linear(F.interpolate(x, scale_factor=0.5).mean((2, 3)))


class Norms(nn.Module):
    """PReLU, InstanceNorm and GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.slope = nn.Conv2d(3, 12, 3, padding=1), nn.PReLU(12)
        self.instance = nn.InstanceNorm2d(12, affine=True)
        self.middle, self.norm = nn.Conv2d(12, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.linear = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.instance(self.slope(self.stem(x)))
        return self.linear(F.gelu(self.norm(self.middle(x))).mean((2, 3)))


class PixelShuffle(nn.Module):
    """Depth to space: four channels become one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.head(F.relu(self.shuffle(self.stem(x))))).mean((2, 3)))


class Branching(nn.Module):
    """Control flow that looks at the data: `torch.fx` cannot take it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 6, 3, padding=1)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.head(x) if float(x.sum()) > -1 else -x
        return self.linear(F.relu(x).mean((2, 3)))


class OneDimensional(nn.Module):
    """1d convolutions on (B, C, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.head, self.linear = nn.Conv1d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.bn(self.stem(x.flatten(2)))), 2)
        return self.linear(F.relu(self.head(x)).mean(2))


class ThreeDimensional(nn.Module):
    """3d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv3d(3, 6, 3, padding=1), nn.BatchNorm3d(6)
        self.head, self.linear = nn.Conv3d(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool3d(F.relu(self.bn(self.stem(x[:, :, None].repeat(1, 1, 2, 1, 1)))), 2)
        return self.linear(F.relu(self.head(x)).mean((2, 3, 4)))


class SamePadding(nn.Conv2d):
    """Pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class NormRelu(nn.BatchNorm2d):
    """Normalisation and activation in one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(
            F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        )


class HalfLinear(nn.Linear):
    """Scales what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) / 2


class Extended(nn.Module):
    """Subclasses whose `forward` does more than torch's, as timm's do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = SamePadding(3, 6, 2, stride=2), NormRelu(6)
        self.second, self.head = SamePadding(6, 5, 2), HalfLinear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.bn(self.first(x))).relu().mean((2, 3)))


class LayerScaled(nn.Module):
    """ConvNeXt: LayerNorm over the stream, a hidden layer at every position, a learned scale on the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 2, stride=2), nn.LayerNorm(8)
        self.deep, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))
        self.head, self.linear = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)
        self.head_scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1))
        y = self.norm(self.deep(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        x = x.permute(0, 3, 1, 2) + self.scale * y
        return self.linear(self.head_scale * F.relu(self.head(x)).mean((2, 3)))


class FrozenNorm(nn.Module):
    """Batch norm whose four vectors are buffers, as in detectors."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.full((channels,), float(name in ("weight", "running_var"))))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift[None, :, None, None]


class Vectors(nn.Module):
    """Numbers per channel in buffers, parameters and plain attributes; a number per position; a token of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.full((3, 1, 1), 0.5)
        self.stem, self.frozen = nn.Conv2d(3, 8, 3, padding=1), FrozenNorm(8)
        self.again, self.shift = nn.Conv2d(8, 8, 3, padding=1), nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.gains, self.places = nn.ParameterList([nn.Parameter(torch.ones(8, 1, 1))]), nn.Parameter(torch.ones(8))
        self.head, self.offset = nn.Conv2d(8, 6, 3, padding=1), torch.linspace(-1, 1, 6)
        self.token, self.table = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.zeros(1, 65, 6))
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.frozen(self.stem(x - self.mean)))
        x = F.relu(self.again(x) * self.gains[0] + self.shift) * self.places + x
        x = (self.head(x) + self.offset.view(-1, 1, 1)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.table
        return self.linear(F.relu(x).mean(1))


class StandardisedConv(nn.Conv2d):
    """Every filter's weights have mean 0 and variance 1, times a learned gain."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, weight=self.gain.view(-1), training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, 1, self.groups)


class MadeWeights(nn.Module):
    """Weights that are made from others: standardised, plain and depthwise, and weight norm; a GroupNorm behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = StandardisedConv(3, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.middle, self.deep = nn.Conv2d(12, 6, 1), StandardisedConv(6, 6, 3, padding=1, groups=6)
        self.unread, self.head = nn.Conv2d(6, 5, 1), StandardisedConv(5, 6, 1)
        self.plain = nn.Conv2d(6, 6, 1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 5, 3, padding=1))
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.middle(F.relu(self.norm(self.stem(x)))))
        x = self.plain(F.relu(self.head(self.unread(F.relu(self.deep(x))))))
        return self.linear(F.relu(self.normed(x)).mean((2, 3)))


class Recurrent(nn.Module):
    """CRNN: columns of a map are the steps of an LSTM of two directions; then a GRU with the steps first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.lstm = nn.LSTM(6 * 4, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.side, self.gru, self.cell = nn.Conv2d(3, 7, 3, padding=1), nn.GRU(7, 4), nn.LSTMCell(7, 3)
        self.linear = nn.Linear(17, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.bn(self.stem(x))), 2)
        y, _ = self.lstm(y.permute(0, 3, 1, 2).flatten(2))
        z = F.relu(self.side(x)).mean(2)
        _, state = self.gru(z.permute(2, 0, 1))
        hidden, _ = self.cell(z.mean(2))
        return self.linear(torch.cat([y.mean(1), state[-1], hidden], 1))


class Attending(nn.Module):
    """Convolutions whose positions attend to each other: linear projections read them, torch's own attention last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.table = nn.Conv2d(3, 7, 4, stride=4), nn.Parameter(torch.zeros(1, 4, 7))
        self.project, self.back = nn.Linear(7, 24), nn.Linear(8, 8)
        self.wide, self.narrow = nn.Linear(8, 10), nn.Linear(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.table
        q, k, v = self.project(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = self.back(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.narrow(F.gelu(self.wide(x)))
        return self.linear((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Auxiliary(nn.Module):
    """A head that runs in training only, behind a dropout of whole channels; training returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.side, self.norm, self.extra = nn.Conv2d(8, 5, 1), nn.BatchNorm1d(5), nn.Linear(5, 4)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        x = F.relu(self.body(F.relu(self.stem(x))))
        out = self.linear(F.dropout(x.mean((2, 3)), training=self.training))
        if not self.training:
            return out
        return {"out": out, "aux": self.extra(self.norm(self.side(F.dropout2d(x)).mean((2, 3))))}


class Tied(nn.Module):
    """Two convolutions with one weight, and a transposed one with the weight of the convolution that it undoes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.second.weight = self.first.weight
        self.down, self.up = nn.Conv2d(8, 6, 2, stride=2), nn.ConvTranspose2d(6, 8, 2, stride=2)
        self.up.weight = self.down.weight
        self.head, self.linear = nn.Conv2d(8, 5, 3, padding=1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(F.relu(self.stem(x))))))
        x = F.relu(self.up(F.relu(self.down(x))))
        return self.linear(F.relu(self.head(x)).mean((2, 3)))


class MadeTensors(nn.Module):
    """Tensors made from sizes: beside channels, added to them, multiplied with them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(8, 7, 3, padding=1)
        self.head, self.linear = nn.Conv2d(7, 5, 3, padding=1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, x.new_zeros(x.size(0), 2, x.size(2), x.size(3))], 1)
        x = self.middle(x)
        x = F.relu(x + x.new_full(x.shape, 0.5)) * x.new_ones(x.size(0), x.size(1), 1, 1)
        return self.linear(F.relu(self.head(x)).mean((2, 3)))


class Unpooled(nn.Module):
    """Pooling whose indices say where another layer's filters go: both go together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.back, self.head, self.linear = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 7, 3), nn.Linear(7, 4)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x, places = self.pool(F.relu(self.stem(x)))
        x = self.unpool(F.relu(self.back(F.relu(self.middle(x)))), places)
        return self.linear(F.relu(self.head(x)).mean((2, 3)))


ZOO = {
    each.__name__: each
    for each in (
        ResidualStream, PadShortcut, Concat, Depthwise, Grouped, Reused, Chunked, Shuffled, Flattened, Gated, Decoder,
        Viewed, MaxOverChannels, Norms, PixelShuffle, Branching, OneDimensional, ThreeDimensional,
        Extended, LayerScaled, Vectors, MadeWeights, Recurrent, Attending,
        Auxiliary, Tied, MadeTensors, Unpooled,
    )
}  # fmt: skip
IMAGES = (2, 3, 8, 8)
