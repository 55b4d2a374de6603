"""Fused convolutions do what they replace, in either precision, on all channels or some."""

import pytest
import torch
from answered import answered, some_masks
from keepdrop.envs.evaluation.fused_conv import FusedConv, can_fuse, picked
from keepdrop.envs.evaluation.mask_evaluator import MaskEvaluator
from keepdrop.envs.evaluation.masked_network import MaskedNetwork
from keepdrop.envs.evaluation.settings import EvaluationSettings
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn, vgg16_bn
from keepdrop.envs.search_judge import disagreement
from keepdrop.errors import UserError
from torch import nn
from zoo import ZOO

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
    targets = [str(node.target) for node in network._halves.suffix.graph.nodes]
    assert sum("fused" in target for target in targets) == 5  # of 7: the stem and one more lie in the prefix
    assert targets.count("add_") == 1  # the shortcut that comes with the frontier must not be overwritten


def test_a_chain_computes_only_what_is_read():
    model, images, _, groups, generator = answered(small_cnn, (1, 8, 8), 40)
    network = MaskedNetwork(model, groups, images[:3])
    # The first group's channels come with the frontier.
    assert len(network._halves.feeders) == 3
    masks = {group.name: some_masks(group, 1, generator) for group in groups}
    with network.masked(masks, 0):
        widths = [fused._now[0].shape[0] for fused in network._halves.feeders.values()]
    kept = [int(masks[group.name].sum()) for group in groups[1:4]]
    assert sorted(widths) == sorted(kept)


@pytest.mark.parametrize("name", [*ZOO, "resnet", "vgg"])
def test_advancing_is_masking(name):
    special = {"resnet": (lambda: cifar_resnet(8), (3, 16, 16)), "vgg": (vgg16_bn, (3, 32, 32))}
    make, shape = special.get(name) or (ZOO[name], (3, 8, 8))
    model, images, labels, groups, generator = answered(make, shape, 8 if name == "vgg" else 40)
    masks = {group.name: some_masks(group, 2, generator) for group in groups[:: 6 if name == "vgg" else 1]}
    chosen = [group for group in groups if group.name in masks]
    for cache_gib in (1.0, 0.0):
        evaluator = MaskEvaluator(model, chosen, images, labels, cache_gib=cache_gib)
        expected = evaluator.correct_per_image(masks)
        for index in range(2):
            now = evaluator
            for group in chosen[:-1]:
                now = now.advanced({group.name: masks[group.name][index]})
            last = chosen[-1].name
            got = now.correct_per_image({last: masks[last][index : index + 1]})
            assert (got[0] != expected[index]).float().mean() <= 0.03  # other kernels: a near tie may turn
        assert torch.equal(evaluator.correct_per_image(masks), expected)


def test_advancing_with_a_mix_and_in_bfloat16():
    model, images, labels, groups, generator = answered(lambda: cifar_resnet(8), (3, 16, 16), 40)
    mask = some_masks(groups[1], 1, generator)
    key = (groups[1].name, groups[1].consumers[0].module)
    mixes = {key: torch.randn(1, groups[1].n_filters, groups[1].n_filters, generator=generator) * mask[:, None]}
    last = some_masks(groups[-1], 3, generator)
    for dtype, tolerance in (("float32", 0.0), ("bfloat16", 0.1)):
        evaluator = MaskEvaluator(model, [groups[1], groups[-1]], images, labels, dtype=dtype)
        both = {groups[1].name: mask.expand(3, -1), groups[-1].name: last}
        expected = evaluator.correct_per_image(both, mixes={key: mixes[key].expand(3, -1, -1)})
        now = evaluator.advanced({groups[1].name: mask[0]}, {key: mixes[key][0]})
        got = now.correct_per_image({groups[-1].name: last})
        assert (got != expected).float().mean() <= tolerance
        assert now.cached_bytes < evaluator.cached_bytes


def test_bfloat16_is_near_and_half_the_size():
    model, images, labels, groups, generator = answered(lambda: cifar_resnet(8), (3, 16, 16), 40)
    masks = {groups[1].name: some_masks(groups[1], 4, generator)}
    exact = MaskEvaluator(model, groups[1:2], images, labels)
    quick = MaskEvaluator(model, groups[1:2], images, labels, dtype="bfloat16")
    assert quick.cached_bytes * 2 == exact.cached_bytes
    assert (exact.correct_per_image(masks) != quick.correct_per_image(masks)).float().mean() < 0.1
    with pytest.raises(UserError, match="dtype of evaluation must be one of float32, bfloat16, got 'float16'"):
        MaskedNetwork(model, groups, images, dtype="float16")


def test_the_disagreement_of_a_precision_is_measured():
    from judged import make_task

    settings = {"compensation_images": 150, "statistics_images": 60}
    masks = torch.rand(5, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[:, 0] = True
    same = disagreement(make_task(EvaluationSettings(**settings)).layer("conv2"), masks)
    assert same == {"answers": 0.0, "accuracy": 0.0}
    layer = make_task(EvaluationSettings(dtype="bfloat16", **settings)).layer("conv2")
    apart = disagreement(layer, masks)
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
    assert fused.is_matrix and not plain.is_matrix
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
    assert not FusedConv(conv, True, (4, 4)).is_matrix
    assert not FusedConv(nn.Conv2d(6, 8, 3, padding=1, groups=2).requires_grad_(False), True, (2, 2)).is_matrix


def test_last_convolutions_of_a_vgg_are_matrices():
    model, images, _, groups, _ = answered(vgg16_bn, (3, 32, 32), 4)
    network = MaskedNetwork(model, groups[-2:], images[:3])
    assert [name for name, fused in network._halves.fused.items() if fused.is_matrix] == [
        "features.34",
        "features.37",
        "features.40",
    ]
