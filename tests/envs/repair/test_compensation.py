"""Masked and mixed equals cut and folded; the regression is the least-squares solution it claims to be."""

import copy

import pytest
import torch
from keepdrop.envs.evaluation.mask_evaluator import MaskEvaluator
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.groups.verification import randomised
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.networks.module_kinds import is_leaf, is_recurrent
from keepdrop.envs.repair.compensation import Compensation, Moments, solve
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.masking import masked_inputs
from keepdrop.envs.surgery.shared_weights import sharing_modules
from keepdrop.errors import UserError
from torch import nn
from zoo import IMAGES, ZOO


def _prepared(make, shape=IMAGES, count=12):
    generator = torch.Generator().manual_seed(7)
    model = randomised(make(), generator)
    images = torch.randn(count, *shape[1:], generator=generator, dtype=torch.float64)
    groups = [g for g in find_groups(model, images[:1], verify=False).groups if g.n_filters > 1]
    return model, images, groups, generator


def _keep(group, generator):
    keep = torch.rand(group.n_filters, generator=generator) < 0.6
    keep[0] = True
    return keep


NETWORKS = {
    **{name: (make, IMAGES) for name, make in ZOO.items()},
    "small_cnn": (small_cnn, (1, 1, 8, 8)),
    "cifar_resnet": (lambda: cifar_resnet(8), (1, 3, 16, 16)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_and_mixed_equals_pruned_and_folded(name):
    model, images, groups, generator = _prepared(*NETWORKS[name])
    for group in groups:
        keep = _keep(group, generator)
        compensation = Compensation.fit(model, group, images)
        # A layer with a forward of its own may do something to its input before it reads it.
        readers = {cut.module: model.get_submodule(cut.module) for cut in group.consumers}
        own = {name for name, module in readers.items() if not is_leaf(module) and not is_recurrent(module)}
        assert set(compensation.skipped) == own | (readers.keys() & sharing_modules(model))
        mixes = {key: matrix[0] for key, matrix in compensation.matrices(keep[None]).items()}
        pruned = prune(model, {group: keep})
        compensation.fold(pruned, group, keep)
        with torch.no_grad():
            with masked_inputs(model, {group: keep}, mixes):
                expected = model(images)
            assert torch.allclose(pruned(images), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
            folded_first = prune(compensation.folded(model, keep), {group: keep})
            assert torch.equal(folded_first(images), pruned(images))


def test_kept_channels_stay_exactly_and_dropped_ones_are_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, dtype=torch.float64, generator=generator)
    x[:, 3] = 2 * x[:, 0] - x[:, 1] + 0.1 * x[:, 3]
    keep = torch.tensor([True, True, False, False, True])
    (mix,) = solve(Moments(x.T @ x, x.T @ x), keep[None], ridge=1e-9)
    assert torch.equal(mix[keep][:, keep], torch.eye(3, dtype=torch.float64))
    assert torch.equal(mix[:, ~keep], torch.zeros(5, 2, dtype=torch.float64))
    expected = torch.linalg.lstsq(x[:, keep], x[:, 3]).solution
    assert torch.allclose(mix[3, keep], expected, atol=1e-6)


def test_many_masks_at_once_equal_one_by_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    moments = Moments(x.T @ x, x.T @ torch.randn(50, 6, dtype=torch.float64, generator=generator))
    masks = torch.rand(4, 6, generator=generator) < 0.5
    masks[:, 0] = True
    together = solve(moments, masks, 1e-3)
    for mask, mix in zip(masks, together, strict=True):
        assert torch.allclose(solve(moments, mask[None], 1e-3)[0], mix, rtol=1e-12, atol=1e-14)
        # The closed form with a ridge towards plain masking, on the kept channels alone.
        strength = 1e-3 * moments.gram.diagonal().mean()
        start = torch.diag(mask.double())[:, mask]
        inner = moments.gram[mask][:, mask] + strength * torch.eye(int(mask.sum()), dtype=torch.float64)
        target = (moments.cross[mask].T + strength * start) @ torch.linalg.inv(inner)
        assert torch.allclose(mix[:, mask], target, atol=1e-10)


def test_a_copied_channel_is_replaced_without_loss():
    model, images, groups, _ = _prepared(small_cnn, (1, 1, 8, 8), 40)
    with torch.no_grad():
        for name in ("weight", "bias"):
            if getattr(model.conv2, name) is not None:
                getattr(model.conv2, name)[5] = getattr(model.conv2, name)[9]
        for tensor in (model.bn2.weight, model.bn2.bias, model.bn2.running_mean, model.bn2.running_var):
            tensor[5] = tensor[9]
        plain = model(images)
    keep = torch.arange(16) != 5
    compensation = Compensation.fit(model, groups[1], images, ridge=1e-12)
    masked = prune(model, {groups[1]: keep})
    compensated = copy.deepcopy(masked)
    compensation.fold(compensated, groups[1], keep)
    with torch.no_grad():
        assert (masked(images) - plain).abs().max() > 1e-2 * plain.abs().max()
        assert torch.allclose(compensated(images), plain, rtol=1e-6, atol=1e-6 * float(plain.abs().max()))


def test_the_dense_network_as_target_corrects_drift():
    model, images, groups, generator = _prepared(lambda: cifar_resnet(8), (1, 3, 16, 16), 40)
    first, second = groups[1], groups[2]
    pruned = prune(model, {first: _keep(first, generator)})
    (group,) = [g for g in find_groups(pruned, images[:1], verify=False).groups if g.name == second.name]
    keep = torch.rand(group.n_filters, generator=generator) < 0.8
    errors = {}
    with torch.no_grad():
        goal = model(images)
        for name, dense in (("own", None), ("dense", model)):
            result = prune(pruned, {group: keep})
            Compensation.fit(pruned, group, images, dense=dense).fold(result, group, keep)
            errors[name] = float((result(images) - goal).square().mean())
    assert errors["dense"] < errors["own"]


def test_a_dense_network_whose_channels_are_numbered_otherwise():
    model, images, groups, _generator = _prepared(ZOO["Concat"], count=40)
    by_name = {group.name: group for group in groups}
    pruned = prune(model, {by_name["left"]: torch.arange(7) < 4})
    now = {group.name: group for group in find_groups(pruned, images[:1], verify=False).groups}["right"]
    assert now.consumers[0].channels.tolist() != by_name["right"].consumers[0].channels.tolist()
    exact = Compensation.fit(pruned, now, images, dense=model, dense_group=by_name["right"])
    # Nothing in front of `right` changed, so its channels are the dense network's own.
    for each in exact.moments.values():
        assert torch.allclose(each.gram, each.cross, rtol=1e-9)
    with pytest.raises(UserError, match="dense network's group 'stem' does not match"):
        Compensation.fit(pruned, now, images, dense=model, dense_group=by_name["stem"])


def test_the_evaluator_takes_the_mixes():
    model, images, groups, generator = _prepared(small_cnn, (1, 1, 8, 8), 40)
    model, images = model.float(), images.float()
    group = groups[2]
    masks = torch.stack([_keep(group, generator) for _ in range(3)])
    compensation = Compensation.fit(model, group, images)
    with torch.no_grad():
        labels = model(images).argmax(1)
        expected = []
        for mask in masks:
            pruned = prune(model, {group: mask})
            compensation.fold(pruned, group, mask)
            expected.append(int((pruned(images).argmax(1) == labels).sum()))
    evaluator = MaskEvaluator(model, [group], images, labels)
    names = {group.name: masks}
    assert evaluator.correct(names, mixes=compensation.matrices(masks)).tolist() == expected
    assert evaluator.correct(names).tolist() != expected


def test_batches_and_modes_do_not_matter():
    model, images, groups, _ = _prepared(small_cnn, (1, 1, 8, 8), 20)
    model.train()
    before = copy.deepcopy(model.state_dict())
    one = Compensation.fit(model, groups[0], images).moments["conv2"].gram
    many = Compensation.fit(model, groups[0], images, batch=3).moments["conv2"].gram
    assert torch.allclose(one, many, rtol=1e-12)
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_consumer_that_reads_across_blocks_is_skipped():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.deep = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 8, 1, groups=2)
            self.linear = nn.Linear(8, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.linear(self.deep(torch.cat([x, x.flip(1)], 1)).mean((2, 3)))

    model, images, groups, _ = _prepared(Crossed)
    group = groups[0]
    compensation = Compensation.fit(model, group, images)
    for name, reason in compensation.skipped.items():
        assert reason == f"the grouped convolution {name!r} reads its filters in different blocks"
    assert set(compensation.moments) | set(compensation.skipped) == {"deep"}


def test_user_mistakes():
    model, images, groups, generator = _prepared(small_cnn, (1, 1, 8, 8))
    with pytest.raises(UserError, match="ridge of a compensation must be greater than 0, got 0"):
        Compensation.fit(model, groups[0], images, ridge=0)
    keep = _keep(groups[0], generator)
    compensation = Compensation.fit(model, groups[0], images)
    with pytest.raises(UserError, match="was fitted for group 'conv1', not for this 'conv2'"):
        compensation.fold(prune(model, {groups[0]: keep}), groups[1], keep)
    both = prune(model, {groups[0]: keep, groups[1]: _keep(groups[1], generator)})
    with pytest.raises(UserError, match="fold right after pruning group 'conv1' alone"):
        compensation.fold(both, groups[0], keep)
