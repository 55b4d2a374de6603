"""Fused convolutions do what they replace, in either precision, on all channels or some."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from answered import answered, some_masks
from digits_task import make_task
from keepdrop.envs.evaluation.evaluation_settings import EvaluationSettings
from keepdrop.envs.evaluation.fused_conv import FusedConv, can_fuse, picked
from keepdrop.envs.evaluation.mask_evaluator import MaskEvaluator
from keepdrop.envs.evaluation.masked_network import EMULATED, MaskedNetwork, warn_of_emulation
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn, vgg16_bn
from keepdrop.errors import UserError
from torch import nn

pytestmark = pytest.mark.skipif(not can_fuse(torch.zeros(1, 1, 4, 4)), reason="this torch has no fused convolution")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("relu", [True, False])
def test_one_call_is_the_chain(groups, relu):
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=groups).requires_grad_(False)
    x, residual = torch.randn(3, 6, 9, 9), torch.randn(3, 8, 5, 5)
    fused, after = FusedConv(conv, relu), torch.relu if relu else nn.Identity()
    with torch.inference_mode():
        assert torch.allclose(fused(x), after(conv(x)), atol=1e-5)
        assert torch.allclose(fused(x, residual.clone()), after(conv(x) + residual), atol=1e-5)


def test_channels_left_out_at_either_end():
    conv = nn.Conv2d(6, 8, 3, padding=1).requires_grad_(False)
    x, reads, writes = torch.randn(3, 6, 9, 9), torch.tensor([0, 3, 5]), torch.tensor([1, 2, 7])
    fused = FusedConv(conv, False)
    weight = conv.weight.clone()
    weight[:, [1, 2, 4]] = 0
    expected = nn.functional.conv2d(x, weight, conv.bias, padding=1)
    with torch.inference_mode():
        fused.load(weight, reads, writes)
        assert torch.allclose(fused(x), expected[:, writes], atol=1e-5)
        fused.load(weight, reads, narrow=True)
        assert torch.allclose(fused(picked(x, reads)), expected, atol=1e-5)
        fused.reset()
        assert torch.allclose(fused(x), conv(x), atol=1e-5)


def test_everything_of_a_resnet_is_fused_and_sums_are_inside():
    model, images, _, groups, _ = answered(lambda: cifar_resnet(8), (3, 16, 16), 40)
    network = MaskedNetwork(model, groups[1:2], images[:3])
    targets = [str(node.target) for node in network._partition.suffix.graph.nodes]
    assert sum("fused" in target for target in targets) == 5  # of 7: the stem and one more lie in the prefix
    assert targets.count("add_") == 1  # the shortcut that comes with the frontier must not be overwritten


def test_a_chain_computes_only_what_is_read():
    model, images, _, groups, generator = answered(small_cnn, (1, 8, 8), 40)
    network = MaskedNetwork(model, groups, images[:3])
    # The first group's channels come with the frontier.
    assert len(network._partition.feeders) == 3
    masks = {group.name: some_masks(group, 1, generator) for group in groups}
    with network.masked(masks, 0):
        widths = [fused._now[0].shape[0] for fused in network._partition.feeders.values()]
    kept = [int(masks[group.name].sum()) for group in groups[1:4]]
    assert sorted(widths) == sorted(kept)


@pytest.mark.filterwarnings("ignore:This processor does not compute in bfloat16")
def test_bfloat16_is_near_and_half_the_size():
    model, images, labels, groups, generator = answered(lambda: cifar_resnet(8), (3, 16, 16), 40)
    masks = {groups[1].name: some_masks(groups[1], 4, generator)}
    exact = MaskEvaluator(model, groups[1:2], images, labels)
    quick = MaskEvaluator(model, groups[1:2], images, labels, dtype="bfloat16")
    assert quick.cached_bytes * 2 == exact.cached_bytes
    assert (exact.correct_per_image(masks) != quick.correct_per_image(masks)).float().mean() < 0.1
    with pytest.raises(UserError, match="dtype of evaluation must be one of float32, bfloat16, got 'float16'"):
        MaskedNetwork(model, groups, images, dtype="float16")


def test_bfloat16_on_a_processor_without_it(monkeypatch):
    """Evaluated by torch's own convolutions, with one warning for all layers; float32 stays fused."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    warn_of_emulation.cache_clear()
    model, images, labels, groups, generator = answered(lambda: cifar_resnet(8), (3, 16, 16), 40)
    masks = {groups[1].name: some_masks(groups[1], 4, generator)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        plain, _ = (MaskEvaluator(model, [group], images, labels, dtype="bfloat16") for group in groups[1:3])
    assert [str(each.message) for each in said] == [EMULATED]
    assert plain.network.method == "split" and not plain.network._partition.fused
    exact = MaskEvaluator(model, groups[1:2], images, labels)
    assert exact.network._partition.fused
    assert plain.cached_bytes * 2 == exact.cached_bytes
    assert (exact.correct_per_image(masks) != plain.correct_per_image(masks)).float().mean() < 0.1


@pytest.mark.parametrize("supported", [True, False])
def test_which_precision_is_fused(monkeypatch, supported):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    images = torch.zeros(1, 1, 4, 4)
    assert can_fuse(images) and can_fuse(images, torch.bfloat16) == supported


def test_a_torch_that_cannot_be_asked_has_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_convolution_pointwise=None))
    images = torch.zeros(1, 1, 4, 4)
    assert can_fuse(images) and not can_fuse(images, torch.bfloat16)


def test_without_onednn_nothing_is_fused_and_counts_are_the_same(monkeypatch):
    """As on macOS and some Arm builds of torch."""
    model, images, labels, groups, generator = answered(lambda: cifar_resnet(8), (3, 16, 16), 40)
    masks = {group.name: some_masks(group, 4, generator) for group in groups}
    fused = MaskEvaluator(model, groups, images, labels)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = MaskEvaluator(model, groups, images, labels)
    assert plain.network.method == "split" and not plain.network._partition.fused and fused.network._partition.fused
    assert torch.equal(plain.correct_per_image(masks), fused.correct_per_image(masks))


@pytest.mark.filterwarnings("ignore:This processor does not compute in bfloat16")
def test_the_disagreement_of_a_precision_is_measured():
    settings = {"compensation_images": 150, "statistics_images": 60}
    masks = torch.rand(5, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[:, 0] = True
    same = make_task(EvaluationSettings(**settings)).layer("conv2").disagreement_with_float32(masks)
    assert same == {"answers": 0.0, "accuracy": 0.0}
    layer = make_task(EvaluationSettings(dtype="bfloat16", **settings)).layer("conv2")
    apart = layer.disagreement_with_float32(masks)
    assert 0 < apart["answers"] < 0.05 and apart["accuracy"] <= apart["answers"] * 5
    # A decision is verified in full precision.
    exact = make_task(EvaluationSettings(**settings)).layer("conv2").outcomes(masks)
    assert layer.outcomes(masks) == exact


@pytest.mark.slow
def test_a_compiled_suffix_counts_the_same():
    model, images, labels, groups, generator = answered(small_cnn, (1, 8, 8), 40)
    masks = {groups[1].name: some_masks(groups[1], 3, generator)}
    plain = MaskEvaluator(model, groups[1:2], images, labels).correct(masks)
    assert torch.equal(MaskEvaluator(model, groups[1:2], images, labels, compile=True).correct(masks), plain)


def _is_matrix(fused):
    return fused._matrix_of is not None


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    ("size", "how"),
    [
        ((2, 2), {"kernel_size": 3, "padding": 1}),
        ((1, 1), {"kernel_size": 1}),
        ((1, 1), {"kernel_size": 3, "padding": 1}),
        ((2, 3), {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1)}),
        ((2, 2), {"kernel_size": 3, "padding": 2, "dilation": 2}),
    ],
)
def test_a_few_pixels_are_one_matrix_product(size, how, relu):
    conv = nn.Conv2d(6, 8, **how).requires_grad_(False)
    x, after = torch.randn(40, 6, *size), torch.relu if relu else nn.Identity()
    fused, reads, writes = FusedConv(conv, relu, size), torch.tensor([0, 3, 5]), torch.tensor([1, 2, 7])
    plain = FusedConv(conv, relu)
    assert _is_matrix(fused) and not _is_matrix(plain)
    with torch.inference_mode():
        assert torch.allclose(fused(x), after(conv(x)), atol=1e-5)
        residual = torch.randn_like(conv(x))
        assert torch.allclose(fused(x, residual.clone()), after(conv(x) + residual), atol=1e-5)
        for each in (fused, plain):
            each.load(None, reads, writes)
        assert torch.allclose(fused(x), plain(x), atol=1e-5)
        for rows in (2, 3, 7, 39):  # whatever stands beside an image, it comes out the same
            assert torch.equal(fused(x[:rows]), fused(x)[:rows])


def test_large_maps_stay_convolutions():
    conv = nn.Conv2d(6, 8, 3, padding=1).requires_grad_(False)
    assert not _is_matrix(FusedConv(conv, True, (4, 4)))
    grouped = nn.Conv2d(6, 8, 3, padding=1, groups=2).requires_grad_(False)
    assert not _is_matrix(FusedConv(grouped, True, (2, 2)))


def test_last_convolutions_of_a_vgg_are_matrices():
    model, images, _, groups, _ = answered(vgg16_bn, (3, 32, 32), 4)
    network = MaskedNetwork(model, groups[-2:], images[:3])
    assert [name for name, fused in network._partition.fused.items() if _is_matrix(fused)] == [
        "features.34",
        "features.37",
        "features.40",
    ]
