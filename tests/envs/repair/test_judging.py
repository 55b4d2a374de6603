"""Judging masks without building networks: the same bits as cutting, repairing and counting one by one."""

from dataclasses import replace

import pytest
import torch
from digits_task import make_task
from keepdrop.envs.data.objective import TOP1
from keepdrop.envs.evaluation.mask_evaluator import correct_flags
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.groups.verification import randomised
from keepdrop.envs.networks.built_in import cifar_resnet
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.judging import Judge, _cut_modules
from keepdrop.envs.repair.patches import SampledPlaces, Samples, chosen_ridge, inputs_at, outputs_at, regress
from keepdrop.envs.repair.reconstruction import Reconstruction, ReconstructionSettings, narrowed
from keepdrop.envs.surgery.cutting import kept_rows, prune
from keepdrop.envs.surgery.filter_group import coupled
from torch import nn
from zoo import IMAGES, ZOO

# Called several times, weights in several places or of classes of their own, or no trace: these are cut for real.
UNSUITED = {"Attending", "Auxiliary", "Branching", "Extended", "LayerScaled", "MadeWeights", "Recurrent", "Reused"}
UNSUITED |= {"Tied", "Vectors"}
SETTINGS = ReconstructionSettings(images=48, places=8)


def _masks(groups, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        choices = {group: torch.rand(group.n_filters, generator=generator) < 0.6 for group in groups}
        for keep in choices.values():
            keep[0] = True
        found.append(choices)
    return found


def _randomised(name, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    model = randomised(ZOO[name](), generator).to(dtype).eval()
    images = torch.randn(60, *IMAGES[1:], generator=generator, dtype=torch.float64).to(dtype)
    return model, images, [g for g in find_groups(model, images[:1], verify=False).groups if g.n_filters > 1]


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_network_of_the_zoo_is_judged_as_cut_or_says_why_not(name):
    model, images, groups = _randomised(name, torch.float64)
    if not groups:
        pytest.skip("no group to prune")
    with torch.no_grad():
        labels = model(images).argmax(1)
    judge = Judge(model, groups, images, labels, TOP1, None)
    assert bool(judge.obstacle) == (name in UNSUITED)
    if judge.obstacle:
        return
    before = {key: value.clone() for key, value in model.state_dict().items()}
    choices = _masks(groups, 3)
    for each, found in zip(choices, judge.points(choices), strict=True):
        assert torch.equal(found, correct_flags(prune(model, each).eval(), images, labels))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def _judge(model, images, groups):
    return Judge(model, groups, images, torch.zeros(len(images), dtype=torch.int64), TOP1, None)


@pytest.mark.parametrize(("chunk", "per_weight"), [(7, None), (48, None), (48, 3.0)])
def test_repaired_weights_are_those_of_the_cut_network_bit_for_bit(chunk, per_weight):
    generator = torch.Generator().manual_seed(2)
    model = randomised(cifar_resnet(8, widths=(8, 12, 16)), generator).float().eval()
    images = torch.randn(SETTINGS.images, 3, 16, 16, generator=generator)
    groups = find_groups(model, images[:1]).groups
    reconstruction = Reconstruction(model, images, replace(SETTINGS, per_weight=per_weight))
    judge = Judge(model, groups, images, torch.zeros(len(images), dtype=torch.int64), TOP1, reconstruction)
    assert judge.obstacle == ""
    judge._fit = [slice(a, min(a + chunk, len(images))) for a in range(0, len(images), chunk)]
    for choices in _masks(groups, 3):
        kept = narrowed(model, kept_rows(model, choices))
        modules = _cut_modules(judge._dense, kept)
        with torch.inference_mode():
            assert judge._repaired(modules, kept)
        for key, value in reconstruction.cut(choices).state_dict().items():
            name, _, kind = key.rpartition(".")
            assert torch.equal(getattr(modules[name], kind), value), key


def test_a_masks_points_depend_on_no_other_mask_and_not_on_threads():
    one_shot = OneShotTask(make_task(), ReconstructionSettings(images=64))
    assert one_shot.judge.obstacle == "" and not one_shot.judge._alone
    choices, some = _masks(one_shot.groups, 5), torch.arange(0, 200, 3)
    images, labels = one_shot.task.reward_images
    cut = [correct_flags(one_shot.reconstruction.cut(each).eval(), images[some], labels[some]) for each in choices]
    one_by_one = [one_shot.judge.points([each], some)[0] for each in choices]
    one_shot.judge.side_by_side = 3
    together = one_shot.judge.points(choices, some)
    one_shot.judge._alone = True
    plainly = one_shot.judge.points(choices[::-1], some)[::-1]
    for found in (one_by_one, together, plainly):
        assert all(torch.equal(a, b) for a, b in zip(found, cut, strict=True))
    assert torch.get_num_threads() == 1


def test_a_graph_that_follows_from_widths_is_not_used():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            x = self.first(x).reshape(x.shape[0], self.first.out_channels, 7, 7)
            return self.second(x).mean((2, 3))

    model, images = Halves().eval(), torch.randn(6, 3, 9, 9)
    groups = [g for g in find_groups(model, images[:1]).groups if g.name == "first"]
    judge = _judge(model, images, groups)
    assert "follows from the widths" in judge.obstacle


def test_a_vanished_branch_is_cut_for_real():
    one_shot = OneShotTask(make_task(), SETTINGS)
    choices = one_shot.choices(torch.ones(one_shot.n_filters, dtype=torch.bool))
    assert coupled(choices) == choices
    masks = torch.stack([torch.cat(list(each.values())) for each in _masks(one_shot.groups, 2)])
    usual = one_shot.outcomes(masks)
    one_shot.judge.points = lambda choices, _: [None] * len(choices)
    assert one_shot.outcomes(masks) == usual


@pytest.mark.parametrize("places", [3, 10_000])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, (3, 1), stride=(2, 1), padding=(2, 0)),
        nn.Conv2d(3, 5, 3, dilation=2, padding="same"),
        nn.Conv1d(3, 5, 4, stride=2, padding=1),
        nn.Conv3d(3, 5, 2, padding=1),
    ],
)
def test_places_of_some_images_are_those_of_all(layer, places):
    sizes = {1: (9,), 2: (8, 7), 3: (4, 5, 4)}[len(layer.kernel_size)]
    images, sampled = torch.randn(7, 3, *sizes), SampledPlaces(7)
    parts = [slice(0, 2), slice(2, 5), slice(5, 7)]
    for _ in range(2):  # the second time from what is known
        found = torch.cat([sampled.inputs(layer, images[rows], rows, places) for rows in parts])
        assert torch.equal(found, inputs_at(layer, images, places))
        outputs = layer(images)
        found = torch.cat([sampled.outputs(outputs[rows], rows, places) for rows in parts])
        assert torch.equal(found, outputs_at(outputs, places))


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("n_samples", [40, 6000])
def test_samples_in_parts_give_the_same_bits(n_samples, intercept):
    torch.manual_seed(0)
    layer = nn.Conv2d(24, 9, 3)
    x, y, prior = torch.randn(n_samples, 216), torch.randn(n_samples, 9), torch.randn(216, 9)
    samples = Samples(n_samples, layer, intercept)
    for rows in (slice(0, 17), slice(17, n_samples)):
        samples.put(rows, x[rows], y[rows])
    ridge = chosen_ridge(x, y, prior, 1e-3, intercept)
    found, failed = samples.solved(prior, 1e-3)
    assert int(failed) == 0 and torch.equal(found, regress(x, y, prior, ridge, intercept))
