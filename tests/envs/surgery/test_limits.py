"""Widths in multiples, least counts and protected filters: what is evaluated and cut holds them, whoever decides."""

import pytest
import torch
from digits_task import MASKED, QUICK, make_task
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.observation import STATISTIC_NAMES
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.filter_group import select_groups
from keepdrop.envs.surgery.group_matching import dense_rows, named_as
from keepdrop.envs.surgery.kept_channels import KeptChannels
from keepdrop.envs.surgery.limits import Limits, check_limits
from keepdrop.envs.task import replace_model
from keepdrop.errors import UserError
from torch import nn
from zoo import ZOO


class Parts(nn.Module):
    """Two parts of one convolution go different ways: two groups, the second named after its first channel."""

    def __init__(self):
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(4, 3, 1), nn.Conv2d(8, 3, 1)
        self.linear = nn.Linear(6, 4)

    def forward(self, images):
        n, x = self.left.in_channels, self.conv(images).relu()
        return self.linear(torch.cat([self.right(x[:, n:]), self.left(x[:, :n])], 1).mean((2, 3)))


SCORES = torch.tensor([0.0, 5, 4, 1, 3, 2, 2, 1, 9, -1])


def _group(n_filters):
    model = small_cnn(widths=(n_filters, 4))
    return model, find_groups(model, torch.randn(1, 1, 8, 8), verify=False).groups[0]


@pytest.mark.parametrize(
    ("limits", "keep", "expected"),
    [
        (Limits(), [0, 3], [0, 3]),
        (Limits(round_to=4), [0, 3, 5], [0, 3, 5, 8]),  # the best dropped filter comes back
        (Limits(round_to=4), [0, 2, 3, 5, 9], [0, 2, 3, 5]),  # the least important kept one goes
        (Limits(round_to=4), [0, 2, 3, 4, 5, 9], [0, 1, 2, 3, 4, 5, 8, 9]),  # as near below as above: up
        (Limits(round_to=4), list(range(9)), list(range(10))),  # 9 lies between 8 and the full 10
        (Limits(round_to=16), [0], list(range(10))),
        (Limits(min_kept=3), [9], [1, 8, 9]),
        (Limits(min_kept=0.35), [9], [1, 2, 8, 9]),
        (Limits(min_kept=3), [0, 1, 2, 3], [0, 1, 2, 3]),
        (Limits(protect={"conv1": [9, 0]}), [1, 2, 3], [0, 1, 9]),  # their places are taken from the kept ones
        (Limits(protect={"conv1": [9, 0]}), [3], [0, 9]),
        (Limits(protect={"conv2": [1]}), [3], [3]),
        (Limits(round_to=3, min_kept=5, protect={"conv1": [7]}), [3], [1, 2, 3, 4, 7, 8]),
    ],
)
def test_what_becomes_of_a_mask(limits, keep, expected):
    model, group = _group(10)
    if limits.round_to == 3:
        model, group = _group(9)
        expected = [each for each in expected if each < 9]
    mask = torch.zeros(1, group.n_filters, dtype=torch.bool)
    mask[0, keep] = True
    allowed = limits.apply(model, group, mask, SCORES[: group.n_filters])
    assert allowed[0].nonzero().flatten().tolist() == expected
    assert torch.equal(limits.apply(model, group, allowed, SCORES[: group.n_filters]), allowed)


def test_multiples_count_channels_and_not_filters():
    """A filter of a grouped convolution is several channels; a group may own a part of a convolution only."""
    model = ZOO["Grouped"]()  # 4 blocks: `grouped` has 16 channels and 4 filters
    group = find_groups(model, torch.randn(2, 3, 8, 8), verify=False).groups[1]
    assert Limits(round_to=8).counts(model, group) == [2, 4]
    model = Parts()
    first, second = find_groups(model, torch.randn(2, 3, 8, 8)).groups[:2]
    assert (first.n_filters, second.n_filters) == (4, 8)
    assert Limits(round_to=8).counts(model, first) == [4] and Limits(round_to=8).counts(model, second) == [4, 8]


def test_tasks_evaluate_and_cut_what_the_limits_allow():
    task = make_task(QUICK, limits=Limits(round_to=4, protect={"conv*": [0]}))
    layer = task.layer("conv2")
    taylor = torch.from_numpy(layer.observation.statistics[:, STATISTIC_NAMES.index("taylor")])
    masks = torch.zeros(2, 10, dtype=torch.bool)
    masks[0, [3, 4, 5, 6, 7]] = masks[1, 1] = True
    allowed = layer.allowed(masks)
    assert allowed.sum(1).tolist() == [4, 4] and allowed[:, 0].all()
    dropped = {3, 4, 5, 6, 7} - set(allowed[0].nonzero().flatten().tolist())
    assert len(dropped) == 2 and taylor[list(dropped)].max() <= taylor[[3, 4, 5, 6, 7]].sort().values[1]
    plain = make_task(QUICK).layer("conv2")
    for outcome, expected in zip(layer.outcomes(masks), plain.outcomes(allowed), strict=True):
        assert outcome == expected and outcome.n_kept == 4
    assert layer.cut(masks[0]).conv2.out_channels == 4
    assert all(
        torch.equal(a, b)
        for a, b in zip(layer.cut(masks[0]).parameters(), plain.cut(allowed[0]).parameters(), strict=True)
    )


def test_protected_filters_are_those_of_the_dense_network():
    """After a first cut of the same group filter 6 is another one than before."""
    task = make_task(MASKED, limits=Limits(protect={"conv2": [6, 9]}))
    layer = task.layer("conv2")
    keep = torch.ones(10, dtype=torch.bool)
    keep[[1, 4]] = False
    kept = task.kept.after(task.model, {layer.group: keep})
    later = replace_model(task, layer.cut(keep), kept).layer("conv2")
    only = torch.zeros(1, 8, dtype=torch.bool)
    only[0, 0] = True
    assert later.allowed(only)[0].nonzero().flatten().tolist() == [4, 7]
    assert later.task.dense_twin(later.group).cuts[0].channels[:, 0].tolist() == [0, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"round_to": 0}, "surgery.round_to is 0; expected a number of channels, 1 or more"),
        ({"min_kept": 0}, "surgery.min_kept is 0; expected a whole number of filters"),
        ({"min_kept": -0.5}, "surgery.min_kept is -0.5"),
        ({"min_kept": 2.5}, "surgery.min_kept is 2.5"),
        ({"min_kept": float("nan")}, "surgery.min_kept is nan"),
        ({"min_kept": float("inf")}, "surgery.min_kept is inf"),
        ({"protect": [1]}, r"surgery.protect is \[1\]; expected numbers of filters by layer"),
        ({"protect": {"conv1": 3}}, "surgery.protect has conv1: 3; expected"),
        ({"protect": {"conv1": ["a"]}}, r"surgery.protect has conv1: \['a'\]; expected"),
        ({"protect": {"conv1": [True]}}, "expected numbers of filters"),
        ({"protect": {"conv1": [1, 1]}}, "names a filter of 'conv1' twice"),
        (
            {"protect": {"conv1": [10]}},
            "names filter 10 of 'conv1', which has 10 filters; expected numbers from 0 to 9",
        ),
        ({"protect": {"conv1": [-1]}}, "names filter -1 of 'conv1'"),
        ({"protect": {"conv7": [1]}}, "No prunable layer is called 'conv7'; the nearest are 'conv"),
        ({"round_to": 16}, r"Under surgery.round_to=16, .* no chosen layer can lose a filter \('conv1' has 10\)"),
        ({"min_kept": 10}, "no chosen layer can lose a filter"),
        ({"protect": {"*1": list(range(10)), "*2": [0, 1, 2, 3]}}, "no chosen layer can lose a filter"),
    ],
)
def test_impossible_limits_are_refused(settings, message):
    model = small_cnn(widths=(10, 4))
    plan = find_groups(model, torch.randn(1, 1, 8, 8), verify=False)
    with pytest.raises(UserError, match=message):
        check_limits(Limits(**settings), model, plan, plan.groups)


def test_one_group_that_can_lose_something_is_enough():
    model = small_cnn(widths=(8, 16))
    plan = find_groups(model, torch.randn(1, 1, 8, 8), verify=False)
    check_limits(Limits(round_to=8), model, plan, plan.groups)
    with pytest.raises(UserError, match="no chosen layer can lose a filter"):
        check_limits(Limits(round_to=8), model, plan, plan.groups[:1])


def test_names_stay_those_of_the_dense_network():
    """Cutting the first part of a convolution moves the channel that the second part is named after."""
    model, images = Parts(), torch.randn(2, 3, 8, 8)
    dense = find_groups(model, images)
    assert dense.names == ("conv", "conv[4]", "right", "left")
    keep = torch.tensor([True, False, False, True])
    kept, model = KeptChannels().after(model, {dense.groups[0]: keep}), prune(model, {dense.groups[0]: keep})
    found = find_groups(model, images)
    assert found.names == ("conv", "conv[2]", "right", "left")
    assert named_as(found, dense, kept).names == dense.names
    assert [group.name for group in select_groups(dense, ["conv[4]"])] == ["conv[4]"]
    twin, rows = dense_rows(found.groups[0], dense, kept)
    assert twin is dense.groups[0] and rows.tolist() == [0, 3]


def test_groups_of_a_pruned_resnet_are_found_in_the_dense_one():
    model, images, kept = cifar_resnet(8), torch.randn(1, 3, 16, 16), KeptChannels()
    dense = find_groups(model, images, verify=False)
    for name in ("conv1", "layer3.0.conv1"):
        (group,) = select_groups(find_groups(model, images, verify=False), [name])
        keep = torch.arange(group.n_filters) % 3 > 0
        kept, model = kept.after(model, {group: keep}), prune(model, {group: keep})
    for group in find_groups(model, images, verify=False).groups:
        twin, rows = dense_rows(group, dense, kept)
        assert twin.name == group.name
        assert rows.tolist() == [i for i in range(twin.n_filters) if i % 3 or group.n_filters == twin.n_filters]
