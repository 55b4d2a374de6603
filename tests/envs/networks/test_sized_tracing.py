"""Networks that compute with the sizes of their values are traced; those that look at the values are not."""

import pytest
import torch
from keepdrop.envs.networks.sized_tracing import traced
from torch import nn
from torch.nn import functional

IMAGES = torch.rand(3, 2, 7, 7, generator=torch.Generator().manual_seed(0))


class Sized(nn.Module):
    """As Hugging Face's: a check of channels, padding as TensorFlow's."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, stride=2), nn.Linear(36, 3)

    def forward(self, x):
        if x.shape[1] != self.conv.in_channels or x.dim() != 4:
            raise ValueError
        pad = int(x.size()[-1]) % 2 + min(x.size(-2), 1)
        y = self.conv(functional.pad(x, [0, pad, 0, pad]))
        return self.head(y[:, :, :3, :3].reshape(x.shape[0], -1))


class Valued(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Counted(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] > 4 else x


def test_sizes_are_constants_and_the_number_of_images_is_not():
    network = Sized().eval()
    graph = traced(network, IMAGES)
    for images in (IMAGES, IMAGES[:1], IMAGES.repeat(5, 1, 1, 1)):
        assert torch.equal(graph(images), network(images))


@pytest.mark.parametrize("padded", [False, True])
def test_lengths_follow_the_number_of_images(padded):
    class Lengths(Sized):
        def forward(self, x):
            if padded and x.shape[1] != 2:  # what plain tracing cannot take
                raise ValueError
            halves = self.conv(x).split(2, 1)
            return torch.cat(halves, 1).view(len(x), -1) + len(self.conv.weight)

    network = Lengths().eval()
    graph = traced(network, IMAGES)
    for images in (IMAGES, IMAGES[:1]):
        assert torch.equal(graph(images), network(images))
    assert len.__module__ == "builtins" and isinstance(len([]), int)


@pytest.mark.parametrize("kind", [Valued, Counted])
def test_a_condition_on_values_or_on_the_number_of_images_is_refused(kind):
    with pytest.raises(torch.fx.proxy.TraceError, match="looks at the values of images, or at their number"):
        traced(kind(), IMAGES)


def test_the_images_are_left_alone():
    class InPlace(Sized):
        def forward(self, x):
            return super().forward(x.mul_(2))

    before = IMAGES.clone()
    traced(InPlace().eval(), IMAGES)
    assert torch.equal(IMAGES, before)
