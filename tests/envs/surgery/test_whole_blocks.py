"""Whole blocks: what stands in a vanished branch's place, and what is known of it."""

import pytest
import torch
from blocks import MAKERS, trained_looking
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.surgery.cutoff import keep_best
from keepdrop.envs.surgery.cutting import checked_masks, prune
from keepdrop.envs.surgery.group_cost import pruned_cost
from keepdrop.envs.surgery.kept_channels import KeptChannels
from keepdrop.envs.surgery.limits import Limits
from keepdrop.envs.surgery.targets import Target, constraints_of
from keepdrop.envs.surgery.whole_blocks import Vanished, geometry
from torch import nn

IMAGES = torch.randn(3, 3, 13, 13, generator=torch.Generator().manual_seed(5))


def without_blocks(name):
    """A network, its groups, and a copy in which all blocks that may vanish have."""
    model = trained_looking(MAKERS[name])
    plan = find_groups(model, IMAGES, whole_blocks=True)
    gone = {group: torch.zeros(group.n_filters, dtype=torch.bool) for group in plan.groups if group.least == 0}
    return model, plan, prune(model, gone), gone


@pytest.mark.parametrize("size", [(1, 5, 7), (3, 13, 13)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 2, 1, 1), (1, 2, 0, 1), (3, 1, 2, 2), (2, 2, 0, 1)]
)
def test_a_vanished_layer_has_the_size_of_the_layer(size, kernel, stride, padding, dilation):
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dilation)
    x = torch.randn(size[0], 3, *size[1:])
    assert Vanished(torch.arange(4.0), geometry(layer))(x).shape == layer(x).shape
    assert Vanished(None, geometry(layer), head=True)(x).shape == (size[0], 1, *layer(x).shape[2:])


def test_the_block_s_input_is_never_written_into():
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    Vanished(None, head=True)(x).add_(1)
    Vanished(torch.ones(3), written=True)(x).add_(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_other_types_layouts_and_sizes(name, dtype):
    smaller = without_blocks(name)[2]
    expected = smaller(IMAGES)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(smaller.to(memory_format=torch.channels_last)(images), expected, rtol=1e-4, atol=1e-5)
    other = smaller.to(dtype)(images.to(dtype))
    assert other.dtype == dtype and torch.allclose(other.float(), expected, rtol=0.1, atol=0.1)
    assert smaller(torch.randn(1, 3, 10, 12).to(dtype)).shape == (1, 5)


@pytest.mark.parametrize("name", ["basic", "inverted", "convnext"])
def test_the_constant_is_trained(name):
    smaller = without_blocks(name)[2].train()
    smaller(IMAGES).square().sum().backward()
    values = [module.value for module in smaller.modules() if isinstance(module, Vanished) and module.value is not None]
    assert len(values) >= 2 and all(value.grad is not None and bool(value.grad.abs().sum() > 0) for value in values)


@pytest.mark.parametrize("name", ["basic", "bottleneck", "gate"])
def test_a_vanished_block_exports(name):
    smaller = without_blocks(name)[2]
    program = torch.export.export(smaller, (IMAGES,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for images in (IMAGES, IMAGES[:2]):
        assert torch.allclose(program(images), smaller(images), rtol=1e-5, atol=1e-6)


def test_a_vanished_block_costs_its_sum_only():
    _, plan, smaller, _ = without_blocks("bottleneck")
    left = {name for name, each in count_cost(smaller, IMAGES).modules.items() if each.macs}
    assert left == {"stem", "head"}
    assert plan.groups[0].least == 1 and "blocks.0.conv1" in plan.names


def test_channels_of_a_vanished_block_are_in_no_list():
    model, plan, smaller, gone = without_blocks("basic")
    stream = plan.groups[0]
    keep = torch.arange(stream.n_filters) % 2 == 0
    kept = KeptChannels().after(model, gone | {stream: keep})
    assert {branch.tail for branch in kept.branches} == {f"blocks.{n}.bn2" for n in range(3)}
    assert not any(".conv1" in name or ".bn" in name for name in kept.rows)
    again = KeptChannels().after(model, gone)
    (now,) = (each for each in find_groups(smaller, IMAGES).groups if each.name == stream.name)
    again = again.after(smaller, {now: keep})
    assert {name: {axis: rows.tolist() for axis, rows in axes.items()} for name, axes in again.rows.items()} == (
        kept.as_lists()
    )


def test_all_zero_masks_are_fine_where_a_block_may_vanish():
    _, plan, _, _ = without_blocks("basic")
    stream, inner = plan.groups[:2]
    assert checked_masks(inner, torch.zeros(2, inner.n_filters)).shape == (2, inner.n_filters)
    with pytest.raises(ValueError, match="keeps no filter at all"):
        checked_masks(stream, torch.zeros(2, stream.n_filters))


def test_a_ranking_gives_a_block_up_only_where_it_may():
    model = trained_looking(MAKERS["bottleneck"])
    cost = count_cost(model, IMAGES)
    for whole_blocks in (False, True):
        groups = find_groups(model, IMAGES, whole_blocks=whole_blocks).groups
        # The first block's second layer is worthless; its first one is the best of all.
        scores = {group.name: torch.ones(group.n_filters).cumsum(0) for group in groups}
        scores["blocks.0.conv2"] *= 0.0
        scores["blocks.0.conv1"] += 100
        gone = {group: 0 for group in groups if group.name.startswith("blocks.0")}
        share = 1 - pruned_cost(model, cost, gone)[0] / cost.macs
        constraints = constraints_of(Target(removed=0.99 * share, of="network"), model, cost, groups)
        masks = keep_best(constraints, scores)
        n_kept = [int(masks[name].sum()) for name in ("blocks.0.conv1", "blocks.0.conv2")]
        assert constraints.holds([int(masks[group.name].sum()) for group in groups])
        assert n_kept == [0, 0] if whole_blocks else n_kept[1] == 1 <= n_kept[0]


def test_limits_count_from_nothing_where_a_block_may_vanish():
    model, plan, _, _ = without_blocks("basic")
    stream, inner = plan.groups[:2]
    limits = Limits(round_to=4)
    assert limits.counts(model, stream) == [4, 8] and limits.counts(model, inner) == [0, 4, 8]
    protected = Limits(round_to=4, protect={inner.name: [1]}).resolved(plan)
    assert protected.counts(model, inner) == [4, 8]
