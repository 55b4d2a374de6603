"""The `reconstruction` criterion against least squares done directly, and what it gives up first."""

import copy

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import hash_state
from keepdrop.envs.networks.cost import count_cost
from keepdrop.envs.repair.reconstruction_error import ErrorCurve, error_curves, reconstruction_scores
from keepdrop.envs.surgery.cutoff import keep_best
from keepdrop.envs.surgery.targets import Target, constraints_of
from keepdrop.errors import UserError
from torch import nn
from torch.nn import functional as F

N_FILTERS = 6


@pytest.fixture
def images():
    return torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    return torch.randint(0, 10, (40,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return small_cnn(widths=(N_FILTERS, 5, 4)).eval()


def groups_of(model, images, *names):
    return [group for group in find_groups(model, images[:1]).groups if group.name in names]


def test_giving_up_one_filter_costs_what_least_squares_says(network, images, labels):
    """At every place of the consumer's output, without sampling: the residual on the other filters, weighed."""
    (group,) = groups_of(network, images, "conv1")
    curve = error_curves(network, [group], images, labels, places=64, ridge=1e-9)["conv1"]
    read = network.relu1(network.bn1(network.conv1(images))).detach()
    rows = F.unfold(read, 3, padding=1).transpose(1, 2).reshape(-1, N_FILTERS * 9).double()
    outputs = rows @ network.conv2.weight.detach().reshape(5, -1).T.double()
    put_out = network.conv2(read).requires_grad_(True)
    rest = network[network._modules and list(network._modules).index("bn2") :]
    loss = F.cross_entropy(rest(put_out), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, put_out)
    fisher = gradient.square().mean((0, 2, 3)).double() * gradient[0, 0].numel() ** 0.5
    costs = []
    for dropped in range(N_FILTERS):
        others = rows[:, [k for k in range(N_FILTERS * 9) if k // 9 != dropped]]
        residual = outputs - others @ torch.linalg.lstsq(others, outputs).solution
        costs.append(float(residual.square().mean(0) @ fisher))
    assert int(curve.order[0]) == costs.index(min(costs))
    assert float(curve.errors[0]) == pytest.approx(min(costs), rel=1e-3)


def test_a_filter_that_stands_twice_goes_first_and_for_nothing(network, images, labels):
    with torch.no_grad():
        for module in (network.conv1, network.bn1):
            for value in module.state_dict().values():
                if value.dim():
                    value[4] = value[1]
    (group,) = groups_of(network, images, "conv1")
    curve = error_curves(network, [group], images, labels, ridge=1e-9)["conv1"]
    assert int(curve.order[0]) in (1, 4)
    assert float(curve.errors[0]) < 1e-4 * float(curve.errors[1])


def test_errors_only_grow_and_every_filter_has_its_place(network, images, labels):
    for curve in error_curves(network, groups_of(network, images, "conv1", "conv2", "conv3"), images, labels).values():
        assert bool((curve.errors.diff() >= 0).all())
        assert sorted(curve.order.tolist()) == list(range(len(curve.errors)))
        scores = curve.scores(100.0)
        assert bool((scores[curve.order].diff() >= 0).all()) and bool((scores >= 0).all())


def test_filters_between_two_steps_of_a_cost_go_together():
    curve = ErrorCurve(torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1.0, 2.0, 3.0, 8.0, 50.0], dtype=torch.float64))
    first, second, third, fourth, last = curve.scores([0.0, 2.0, 2.0, 4.0])[curve.order].tolist()
    assert (first, second, third, fourth) == pytest.approx((1.0, 1.0, 3.0, 3.0)) and last > 1e20
    assert first < second and third < fourth  # the one that is given up first goes first
    # A width that pays worse than the one behind it is left out.
    assert curve.scores([0.0, 0.5, 1.0, 4.0])[curve.order].tolist()[:4] == pytest.approx([2.0] * 4)
    assert float(curve.scores([0.0, 0.0, 0.0, 0.0]).min()) > 1e20  # nothing is saved


@pytest.mark.parametrize("removed", [0.15, 0.3, 0.6])
def test_masks_meet_the_target_and_leave_the_network_alone(removed, images, labels):
    torch.manual_seed(0)
    model = small_cnn(widths=(8, 8, 8, 8))
    groups = [group for group in find_groups(model, images[:1]).groups][:3]
    cost, before = count_cost(model, images[:1]), hash_state(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    goal = constraints_of(Target(removed, "groups"), model, cost, groups)
    masks = keep_best(goal, reconstruction_scores(model, goal, images, labels))
    assert goal.holds([int(masks[group.name].sum()) for group in groups])
    assert all(bool(mask.any()) for mask in masks.values())
    assert hash_state(model) == before and model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(not module._forward_hooks for module in model.modules())


def test_the_same_images_give_the_same_masks(network, images, labels):
    groups = groups_of(network, images, "conv1", "conv2")
    goal = constraints_of(Target(0.5, "groups"), network, count_cost(network, images[:1]), groups)
    first, second = (reconstruction_scores(copy.deepcopy(network), goal, images, labels) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_consumer_that_cannot_be_regressed_is_named(images, labels):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )
    groups = [group for group in find_groups(model, images[:1]).groups if group.name == "0"]
    with pytest.raises(UserError, match=r"cannot judge '0': '2', which reads its filters, is a grouped"):
        error_curves(model, groups, images, labels)
