"""The built-in networks: shapes, key names, tracing, refusals."""

import re

import pytest
import torch
from keepdrop.envs.networks.built_in import cifar_resnet, cifar_resnet18, small_cnn, vgg16_bn
from keepdrop.errors import UserError
from torch import nn

NETWORKS = {
    "small_cnn": (small_cnn, (1, 8, 8)),
    "small_cnn_rgb": (lambda: small_cnn(n_classes=7, in_channels=3, widths=(4, 4, 8, 8, 8, 16)), (3, 16, 16)),
    "resnet20": (cifar_resnet, (3, 32, 32)),
    "resnet56": (lambda: cifar_resnet(56), (3, 32, 32)),
    "vgg16_bn": (vgg16_bn, (3, 32, 32)),
    "vgg16_bn_quarter": (lambda: vgg16_bn(width=16), (3, 32, 32)),
    "resnet18_quarter": (lambda: cifar_resnet18(width=16), (3, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_traceable_and_traced_equals_eager(name):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    images = torch.randn(2, *shape)
    logits = model(images)
    assert logits.shape == (2, 7 if name == "small_cnn_rgb" else 10)
    assert torch.equal(torch.fx.symbolic_trace(model)(images), logits)


@pytest.mark.parametrize(
    ("depth", "n_convs", "n_params"), [(20, 19, 269_722), (56, 55, 853_018), (110, 109, 1_727_962)]
)
def test_resnet_sizes_are_the_published_ones(depth, n_convs, n_params):
    model = cifar_resnet(depth)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == n_convs
    assert sum(parameter.numel() for parameter in model.parameters()) == n_params


def test_resnet_keys_are_those_of_published_checkpoints():
    keys = {re.sub(r"\d", "#", key.rsplit(".", 1)[0]) for key in cifar_resnet(20).state_dict()}
    assert keys == {"conv#", "bn#", *(f"layer#.#.{part}#" for part in ("conv", "bn")), "linear"}


def test_resnet18_has_its_published_size_and_the_keys_of_public_checkpoints():
    model = cifar_resnet18()
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    keys = {re.sub(r"\d", "#", key.rsplit(".", 1)[0]) for key in model.state_dict()}
    block = ("conv#", "bn#", "shortcut.#")
    assert keys == {"conv#", "bn#", *(f"layer#.#.{part}" for part in block), "linear"}


def test_a_quarter_of_the_width_is_a_quarter_of_every_layer():
    for build in (vgg16_bn, cifar_resnet18):
        full, quarter = (
            [m.out_channels for m in build(width=w).modules() if isinstance(m, nn.Conv2d)] for w in (64, 16)
        )
        assert [4 * each for each in quarter] == full


def test_resnet_shortcut_subsamples_and_pads_a_quarter_on_either_side():
    block = cifar_resnet(20).layer2[0]
    images = torch.arange(16 * 16.0).reshape(1, 16, 4, 4)
    shortcut = block.shortcut(images)
    assert shortcut.shape == (1, 32, 2, 2)
    assert torch.equal(shortcut[:, 8:24], images[:, :, ::2, ::2])
    assert shortcut[:, :8].abs().sum() == 0 and shortcut[:, 24:].abs().sum() == 0


def test_small_cnn_has_five_convolutions_each_with_bn_and_relu():
    kinds = [type(module).__name__ for module in small_cnn() if not isinstance(module, nn.MaxPool2d)]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 5 + ["AdaptiveAvgPool2d", "Flatten", "Linear"]


def test_vgg16_has_thirteen_convolutions_and_one_linear_layer():
    modules = list(vgg16_bn().modules())
    assert sum(isinstance(module, nn.Conv2d) for module in modules) == 13
    assert sum(isinstance(module, nn.Linear) for module in modules) == 1


def test_no_activation_works_in_place():
    for build, _ in NETWORKS.values():
        assert not any(getattr(module, "inplace", False) for module in build().modules())


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: cifar_resnet(18), "depth 6n + 2 (20, 32, 44, 56, 110, ...), got depth=18"),
        (lambda: cifar_resnet(20, widths=(16, 8, 64)), "three non-decreasing positive widths, got widths=(16, 8, 64)"),
        (lambda: cifar_resnet18(width=0), "cifar_resnet18 needs a whole number of filters of 1 or more, got width=0"),
        (lambda: vgg16_bn(width=0.25), "vgg16_bn needs a whole number of filters of 1 or more, got width=0.25"),
        (lambda: small_cnn(widths=()), "at least one width of 1 or more, got widths=()"),
    ],
)
def test_impossible_sizes_are_refused(build, text):
    with pytest.raises(UserError, match=re.escape(text)):
        build()
