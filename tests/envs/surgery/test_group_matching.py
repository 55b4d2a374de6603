"""Groups followed through cuts are those that would be found again in the smaller network."""

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.groups.verification import randomised
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.filter_group import SINGLE
from keepdrop.envs.surgery.group_matching import left_of, named_as
from keepdrop.envs.surgery.kept_channels import KeptChannels
from zoo import IMAGES, ZOO

NETWORKS = {
    **{name: (make, IMAGES) for name, make in ZOO.items()},
    "small_cnn": (small_cnn, (2, 1, 8, 8)),
    "cifar_resnet": (lambda: cifar_resnet(14), (2, 3, 8, 8)),
}
# A grouped convolution may become a depthwise one, whose channels hang together otherwise.
AGAIN = {"Decoder", "Grouped"}


def _cuts(plan):
    return [
        (group.name, group.n_filters, [(c.module, c.axis, c.kind, c.channels.tolist()) for c in group.cuts])
        for group in plan.groups
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_followed_groups_are_those_found_again(name):
    make, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(4)
    dense = randomised(make(), generator).eval()
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    plan = find_groups(dense, images)
    if not plan.groups:
        pytest.skip("no group to prune")
    model, kept, task_plan = dense, KeptChannels(), plan
    for _ in range(3):  # cut after cut, as layers are decided
        group = task_plan.groups[int(torch.randint(len(task_plan.groups), (1,), generator=generator))]
        keep = torch.rand(group.n_filters, generator=generator) < 0.5
        keep[-1] = True
        kept, model = kept.after(model, {group: keep}), prune(model, {group: keep})
        task_plan = named_as(find_groups(model, images), plan, kept)
        followed = left_of(plan, dense, kept)
        assert (followed is None) == (name in AGAIN)
        if followed is not None:
            assert _cuts(followed) == _cuts(task_plan)
            assert followed.notes == task_plan.notes
            single = [{each.name for each in p.skipped if each.reason == SINGLE} for p in (followed, task_plan)]
            assert single[1] <= single[0]
        if not task_plan.groups:
            return
