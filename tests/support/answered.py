"""Networks of random weights with their own answers to random images, and masks: what several test files evaluate."""

import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.groups.verification import randomised
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from zoo import ZOO

NETWORKS = {
    **{name: (make, (3, 8, 8)) for name, make in ZOO.items()},
    "small_cnn": (small_cnn, (1, 8, 8)),
    "cifar_resnet": (lambda: cifar_resnet(8), (3, 16, 16)),
}


def answered(make=small_cnn, shape=(1, 8, 8), count=50):
    """A network, images, its answers to them, its groups of two filters or more, and the generator of all that."""
    generator = torch.Generator().manual_seed(5)
    model = randomised(make(), generator).float()
    images = torch.randn(count, *shape, generator=generator)
    groups = [g for g in find_groups(model, images[:1], verify=False).groups if g.n_filters > 1]
    with torch.no_grad():
        labels = model(images).argmax(1)
    return model, images, labels, groups, generator


def some_masks(group, m, generator):
    """M random masks (M, N), none of them empty."""
    masks = torch.rand(m, group.n_filters, generator=generator) < 0.5
    masks[:, 0] = True
    return masks


def logits_of(network, frontier, masks, mixes=None):
    """Logits (M, B, C) of a `MaskedNetwork` under M masks, one after the other; arguments as for its `masked`."""
    found = []
    for index in range(len(next(iter(masks.values())))):
        with network.masked(masks, index, mixes) as run:
            found.append(run(frontier))
    return torch.stack(found)
