"""Repair of a network whose blocks have vanished: the best constant, and what the criterion expects to pay for it."""

import torch
from blocks import MAKERS, trained_looking
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.repair.reconstruction import Reconstruction, ReconstructionSettings
from keepdrop.envs.repair.reconstruction_error import error_curves, reconstruction_scores
from keepdrop.envs.surgery.cutoff import keep_best
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.targets import Target, constraints_of
from torch.nn import functional as F

IMAGES = torch.randn(24, 3, 13, 13, generator=torch.Generator().manual_seed(5))
LABELS = torch.arange(24) % 5
SETTINGS = ReconstructionSettings(images=24, places=10**4)


def outputs_of(model, name, images=IMAGES):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, out: seen.append(out.clone()))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


def test_the_constant_is_the_mean_of_what_the_branch_added():
    model = trained_looking(MAKERS["pre-activation"])
    groups = find_groups(model, IMAGES, whole_blocks=True).groups
    first = next(group for group in groups if group.name == "blocks.0.conv1")
    repaired = Reconstruction(model, IMAGES, SETTINGS).cut({first: torch.zeros(first.n_filters, dtype=torch.bool)})
    wanted = outputs_of(model, "blocks.0.conv2").mean((0, 2, 3))
    assert torch.allclose(repaired.blocks[0].conv2.value, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(repaired.stem.weight, model.stem.weight)
    assert not torch.equal(repaired.blocks[1].conv1.weight, model.blocks[1].conv1.weight)  # it lives with the loss


def test_it_makes_up_for_what_the_shortcut_lost():
    model = trained_looking(MAKERS["basic"])
    groups = {group.name: group for group in find_groups(model, IMAGES, whole_blocks=True).groups}
    gone = {
        groups[f"blocks.{n}.conv1"]: torch.zeros(groups[f"blocks.{n}.conv1"].n_filters, dtype=torch.bool)
        for n in (0, 1)
    }
    repaired = Reconstruction(model, IMAGES, SETTINGS).cut(gone)
    branch, shortcut = (outputs_of(model, f"blocks.1.{name}") for name in ("bn2", "downsample"))
    lost = shortcut - outputs_of(repaired, "blocks.1.downsample")
    assert torch.allclose(repaired.blocks[1].bn2.value, (branch + lost).mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        apart = [F.mse_loss(each(IMAGES), model(IMAGES)) for each in (repaired, prune(model, gone))]
    assert apart[0] < apart[1]


def test_giving_up_the_last_filter_costs_what_varies():
    """Of what a branch adds the mean stays, so that no filter is cheaper than all of it, and dearer than one filter."""
    model = trained_looking(MAKERS["dropout"])
    with torch.no_grad():
        model.blocks[0].conv1.weight.mul_(1e-3)
        model.blocks[0].conv1.bias.fill_(3.0)
    curves = {}
    for whole_blocks in (False, True):
        groups = find_groups(model, IMAGES, whole_blocks=whole_blocks).groups
        inner = [group for group in groups if group.name.endswith("conv1")]
        curves[whole_blocks] = error_curves(model, inner, IMAGES, LABELS)
    for name, whole in curves[False].items():
        may_vanish = curves[True][name].errors
        assert torch.equal(may_vanish[:-1], whole.errors[:-1])
        assert whole.errors[-2] <= may_vanish[-1] < whole.errors[-1]


def test_the_criterion_gives_whole_blocks_up():
    model = trained_looking(MAKERS["bottleneck"])
    groups = find_groups(model, IMAGES, whole_blocks=True).groups
    inner = [group for group in groups if group.least == 0]
    constraints = constraints_of(Target(removed=0.9), model, count_cost(model, IMAGES), inner)
    masks = keep_best(constraints, reconstruction_scores(model, constraints, IMAGES, LABELS))
    kept = {group.name: int(masks[group.name].sum()) for group in inner}
    assert constraints.holds(list(kept.values())) and 0 in kept.values()
    for n in (0, 1):
        assert (kept[f"blocks.{n}.conv1"] == 0) == (kept[f"blocks.{n}.conv2"] == 0)
