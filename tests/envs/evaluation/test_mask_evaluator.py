"""Counts are right, and do not depend on chunks, caches or other masks."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from answered import NETWORKS, answered, some_masks
from keepdrop.envs.evaluation.mask_evaluator import MaskEvaluator, correct_flags, count_correct
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet, vgg16_bn
from keepdrop.envs.surgery.filter_group import select_groups
from keepdrop.envs.surgery.masking import masked_inputs
from keepdrop.errors import UserError

SHARED = Path(__file__).parents[4] / "shared" / "checkpoints"
CIFAR = Path(__file__).parents[4] / "data" / "cifar10.npz"


def _naive(model, images, labels, choices):
    with torch.no_grad(), masked_inputs(model, choices):
        return model(images).argmax(1) == labels


@pytest.mark.parametrize("name", NETWORKS)
def test_fast_equals_naive(name):
    model, images, labels, groups, generator = answered(*NETWORKS[name])
    for group in groups:
        masks = some_masks(group, 4, generator)
        evaluator = MaskEvaluator(model, [group], images, labels, batch=16)
        got = evaluator.correct_per_image({group.name: masks})
        expected = torch.stack([_naive(model, images, labels, {group: mask}) for mask in masks])
        assert torch.equal(got, expected)
        assert torch.equal(evaluator.correct({group.name: masks}), expected.sum(1))


def test_fast_equals_naive_on_vgg():
    model, images, labels, groups, generator = answered(vgg16_bn, (3, 32, 32), 6)
    for group in groups[3::5]:
        masks = some_masks(group, 2, generator)
        got = MaskEvaluator(model, [group], images, labels).correct_per_image({group.name: masks})
        assert torch.equal(got, torch.stack([_naive(model, images, labels, {group: mask}) for mask in masks]))


def test_counts_do_not_depend_on_chunks_cache_method_order_or_company():
    model, images, labels, groups, generator = answered(lambda: cifar_resnet(8), (3, 16, 16))
    group = groups[1]
    masks = some_masks(group, 6, generator)
    reference = MaskEvaluator(model, [group], images, labels).correct({group.name: masks})
    assert reference.dtype == torch.int64 and len(set(reference.tolist())) > 1
    for batch in (7, 16, 64):
        for cache_gib in (1.0, 0.0):
            evaluator = MaskEvaluator(model, [group], images, labels, batch=batch, cache_gib=cache_gib)
            assert torch.equal(evaluator.correct({group.name: masks}), reference)
            assert (evaluator.cached_bytes == 0) == (cache_gib == 0.0)
    whole = MaskEvaluator(model, [group], images, labels, method="whole")
    assert torch.equal(whole.correct({group.name: masks}), reference)
    evaluator = MaskEvaluator(model, [group], images, labels)
    assert torch.equal(evaluator.correct({group.name: masks.flip(0)}).flip(0), reference)
    one_by_one = torch.cat([evaluator.correct({group.name: mask[None]}) for mask in masks])
    assert torch.equal(one_by_one, reference)


@pytest.mark.parametrize("cache_gib", [1.0, 0.0])
def test_a_subset_of_the_images(cache_gib):
    model, images, labels, groups, generator = answered()
    masks = {groups[2].name: some_masks(groups[2], 3, generator)}
    evaluator = MaskEvaluator(model, [groups[2]], images, labels, cache_gib=cache_gib, batch=8)
    every = evaluator.correct_per_image(masks)
    chosen = torch.tensor([40, 3, 17, 3, 0, 49, 22, 21, 20])
    assert torch.equal(evaluator.correct_per_image(masks, image_indices=chosen), every[:, chosen])
    assert torch.equal(evaluator.correct(masks, image_indices=chosen), every[:, chosen].sum(1))


def test_whole_network_masks():
    model, images, labels, groups, generator = answered(lambda: cifar_resnet(8), (3, 16, 16))
    masks = {group.name: some_masks(group, 3, generator) for group in groups}
    got = MaskEvaluator(model, groups, images, labels).correct_per_image(masks)
    for index in range(3):
        choices = {group: masks[group.name][index] for group in groups}
        assert torch.equal(got[index], _naive(model, images, labels, choices))


def test_everything_kept_is_the_plain_network():
    model, images, labels, groups, _ = answered()
    evaluator = MaskEvaluator(model, groups, images, labels)
    assert evaluator.correct({groups[0].name: torch.ones(1, 16, dtype=torch.bool)}).tolist() == [50]


def test_the_cache_stays_within_its_budget():
    model, images, labels, groups, _ = answered()
    evaluator = MaskEvaluator(model, groups[:1], images, labels)
    assert evaluator.cached_bytes == 50 * 16 * 8 * 8 * 4  # the input of conv2
    budget = evaluator.cached_bytes / 2**30
    assert MaskEvaluator(model, groups[:1], images, labels, cache_gib=budget * 1.01).cached_bytes > 0
    assert MaskEvaluator(model, groups[:1], images, labels, cache_gib=budget * 0.99).cached_bytes == 0


def test_programming_errors_are_named():
    model, images, labels, groups, _ = answered()
    evaluator = MaskEvaluator(model, groups[:1], images, labels)
    with pytest.raises(ValueError, match=r"no group 'conv9' here; expected some of \['conv1'\]"):
        evaluator.correct({"conv9": torch.ones(1, 16, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"masks of 'conv1' must be bool \(M, 16\), got torch.float32 \(1, 16\)"):
        evaluator.correct({"conv1": torch.ones(1, 16)})
    with pytest.raises(UserError, match="Expected as many labels as images"):
        MaskEvaluator(model, groups[:1], images, labels[:-1])


def test_correct_flags_leaves_the_model_alone():
    model, images, labels, _, _ = answered()
    model.train()
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    flags = correct_flags(model, images, labels, batch=7)
    assert flags.shape == (50,) and bool(flags.all())
    assert model.training and not model.bn1.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_count_correct_reads_a_data_set():
    model, images, labels, _, _ = answered()
    labels = labels.clone()
    labels[:7] = (labels[:7] + 1) % 10

    class Data:
        def __len__(self):
            return 50

        def batch(self, indices):
            return images[indices], labels[indices]

    assert count_correct(model, Data(), batch=16) == (43, 50)


@pytest.mark.skipif(not (SHARED.exists() and CIFAR.exists()), reason="needs the shared checkpoints and CIFAR-10")
def test_a_trained_resnet20_masked_at_half_of_one_layer():
    from keepdrop.envs.networks.checkpoint import load_checkpoint

    model = cifar_resnet(20)
    load_checkpoint(model, SHARED / "resnet20-a.th")
    with np.load(CIFAR) as arrays:
        images = torch.from_numpy(arrays["x_test"][:200]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(arrays["y_test"][:200]).long()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (images - mean[:, None, None]) / std[:, None, None]
    assert correct_flags(model, images, labels).float().mean() > 0.85
    (group,) = select_groups(find_groups(model, images[:1]), ["layer3.1.conv1"])
    masks = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    got = MaskEvaluator(model, [group], images, labels).correct_per_image({group.name: masks})
    model.eval()
    assert torch.equal(got, torch.stack([_naive(model, images, labels, {group: mask}) for mask in masks]))
    assert (got.float().mean(1) > 0.5).all()
