"""Repair of a network whose blocks have vanished: the best constant, and what the criterion expects to pay for it."""

import torch
from blocks import MAKERS, trained_looking
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.repair.reconstruction import Reconstruction, ReconstructionSettings
from keepdrop.envs.surgery.cutting import prune
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
