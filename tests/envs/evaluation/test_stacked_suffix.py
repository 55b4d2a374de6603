"""Masks in one batch give what they give one by one; fused GPU convolutions what they replace."""

import pytest
import torch
from answered import NETWORKS, answered, logits_of, some_masks
from keepdrop.envs.evaluation.cudnn_conv import CudnnConv, fuse_relu
from keepdrop.envs.evaluation.mask_evaluator import MaskEvaluator
from keepdrop.envs.evaluation.masked_network import MaskedNetwork
from keepdrop.envs.networks.batch_size import chunks, fastest_batch
from keepdrop.envs.networks.built_in import vgg16_bn
from keepdrop.envs.surgery.masking import masked_inputs

# Grouped or transposed consumers, other than 2d, run twice, of an unknown class, or not traced at all.
ONE_BY_ONE = {"Grouped", "Tied", "Reused", "Decoder", "Branching", "OneDimensional", "ThreeDimensional", "Extended"}
ONE_BY_ONE |= {"LayerScaled", "Recurrent", "Attending"}
NETWORKS = {**NETWORKS, "vgg": (vgg16_bn, (3, 32, 32))}


def _same(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_all_masks_at_once_are_the_masked_networks(name):
    model, images, _, groups, generator = answered(*NETWORKS[name], 5)
    choices = {group: some_masks(group, 3, generator) for group in groups}
    mixes = {
        (group.name, cut.module): torch.randn(3, group.n_filters, group.n_filters, generator=generator)
        for group in groups[::2]
        for cut in group.consumers
    }
    network = MaskedNetwork(model, groups, images[:3], stack=True)
    assert network.stacks == (name not in ONE_BY_ONE)
    masks = {group.name: mask for group, mask in choices.items()}
    if not network.stacks:
        with pytest.raises(ValueError, match="one by one"):
            network.together(masks)
        return
    got = network.together(masks, mixes)(network.prefix(images))
    for index in range(3):
        now = {group: mask[index] for group, mask in choices.items()}
        with torch.no_grad(), masked_inputs(model, now, {key: mix[index] for key, mix in mixes.items()}):
            assert _same(got[index], model(images))


def test_only_the_masks_of_one_group_and_nothing_stays_behind():
    model, images, _, groups, generator = answered(*NETWORKS["cifar_resnet"], 5)
    network = MaskedNetwork(model, groups, images[:3], stack=True)
    frontier, first = network.prefix(images), {groups[0].name: some_masks(groups[0], 4, generator)}
    network.together({groups[1].name: some_masks(groups[1], 2, generator)})(frontier)
    assert _same(network.together(first)(frontier), logits_of(network, frontier, first))


@pytest.mark.parametrize("cache_gib", [1.0, 0.0])
@pytest.mark.parametrize("batch", [7, 64])
def test_counts_are_those_of_masks_one_by_one(cache_gib, batch):
    model, images, labels, groups, generator = answered(*NETWORKS["cifar_resnet"])
    masks = {groups[1].name: some_masks(groups[1], 5, generator)}
    alone = MaskEvaluator(model, groups[1:2], images, labels)
    together = MaskEvaluator(model, groups[1:2], images, labels, stack=True, batch=batch, cache_gib=cache_gib)
    assert together.network.stacks and not alone.network.stacks
    assert torch.equal(together.correct_per_image(masks), alone.correct_per_image(masks))
    chosen = torch.tensor([40, 3, 17, 0, 49, 22, 21])
    again = MaskEvaluator(model, groups[1:2], images, labels, stack=True, batch=batch, cache_gib=cache_gib)
    expected = alone.correct_per_image(masks, image_indices=chosen)
    assert torch.equal(again.correct_per_image(masks, image_indices=chosen), expected)


@pytest.mark.filterwarnings("ignore:This processor does not compute in bfloat16")
def test_bfloat16():
    model, images, labels, groups, generator = answered(*NETWORKS["cifar_resnet"])
    masks = {groups[0].name: some_masks(groups[0], 4, generator)}
    how = {"dtype": "bfloat16", "batch": 64}
    together = MaskEvaluator(model, groups[:1], images, labels, stack=True, **how)
    assert together.network.stacks
    exact = MaskEvaluator(model, groups[:1], images, labels).correct_per_image(masks)
    assert (together.correct_per_image(masks) == exact).double().mean() > 0.9


def test_smaller_batches_where_memory_is_not_enough(monkeypatch):
    model, images, labels, groups, generator = answered(*NETWORKS["cifar_resnet"])
    masks = {groups[0].name: some_masks(groups[0], 4, generator)}
    evaluator = MaskEvaluator(model, groups[:1], images, labels, stack=True, batch=256)
    expected = MaskEvaluator(model, groups[:1], images, labels).correct(masks)
    real, rows = evaluator.network.together, []

    def small(*arguments):
        run = real(*arguments)

        def limited(frontier):
            rows.append(len(frontier[0]))
            if rows[-1] > 16:
                raise torch.OutOfMemoryError("no")
            return run(frontier)

        return limited

    monkeypatch.setattr(evaluator.network, "together", small)
    assert torch.equal(evaluator.correct(masks), expected)
    assert rows[:3] == [50, 32, 16] and evaluator.batch == 64
    monkeypatch.setattr(evaluator.network, "together", lambda *_: _no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        MaskEvaluator.correct(evaluator, {groups[0].name: ~masks[groups[0].name]})


def _no_memory(_frontier):
    raise torch.OutOfMemoryError("no")


@pytest.mark.parametrize("name", ["ResidualStream", "PadShortcut", "cifar_resnet", "vgg"])
def test_convolution_sum_and_relu_in_one_module(name):
    model, images, _, groups, generator = answered(*NETWORKS[name], 5)
    network = MaskedNetwork(model, groups[:1], images[:3], stack=True)
    masks = {groups[0].name: some_masks(groups[0], 3, generator)}
    frontier = network.prefix(images)
    expected = network.together(masks)(frontier)
    graph = network._stacked.graph
    assert fuse_relu(graph) > 0
    fused = [module for module in graph.modules() if isinstance(module, CudnnConv)]
    assert fused and _same(network.together(masks)(frontier), expected)
    for relu in (node for node in graph.graph.nodes if node.target is torch.relu_):
        summands = [relu.args[0], *relu.args[0].args] if relu.args[0].target == "add_" else [relu.args[0]]
        assert any(str(each.target).startswith("stacked_") for each in summands)


def test_chunks_never_leave_an_image_alone():
    for count in range(2, 40):
        for batch in range(0, 12):
            found = list(chunks(count, batch))
            assert [i for rows in found for i in range(count)[rows]] == list(range(count))
            assert all(rows.stop - rows.start > 1 for rows in found)


def test_the_batch_that_is_clearly_faster(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("keepdrop.envs.networks.batch_size.time.perf_counter", lambda: now[0])

    def run(values):
        rows = len(values[0])
        now[0] += rows * (1e-6 if rows == 256 else 1e-5)

    assert fastest_batch(run, (torch.zeros(600, 2),)) == 256
    assert fastest_batch(run, (torch.zeros(200, 2),)) == 128
