"""What networks that people bring do between their convolutions: both modes, sizes made on the way, random numbers."""

import random

import numpy as np
import pytest
import torch
from keepdrop.envs.data.randomness import randomness_restored
from keepdrop.envs.evaluation.masked_network import MaskedNetwork
from keepdrop.envs.groups.finding import BATCH_MATTERS, TRAINING_ONLY, find_groups
from keepdrop.envs.groups.verification import difference
from keepdrop.envs.networks.inputs import tensors_in
from keepdrop.envs.surgery.cutting import prune
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import IMAGES, ZOO


class _Between(nn.Module):
    """Two convolutions and what stands between the second and its reader; `wide` says how many channels come out."""

    def __init__(self, between, wide=6):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(wide, 5, 1)
        self.between, self.linear = between, nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(F.relu(self.b(F.relu(self.a(x)))))
        return self.linear(F.relu(self.c(x)).mean((2, 3)))


def _halved(plan):
    return {group: torch.arange(group.n_filters) % 2 == 0 for group in plan.groups}


def _reasons(plan):
    return {item.name: item.reason for item in plan.skipped}


def test_a_head_of_training_is_cut_with_what_it_reads():
    model = ZOO["Auxiliary"]()
    plan = find_groups(model, torch.randn(1, 3, 8, 8))
    assert {cut.module for cut in plan.groups[1].consumers} == {"side", "linear"}
    assert _reasons(plan) == {"side": TRAINING_ONLY} and plan.notes == ()
    smaller, images = prune(model, _halved(plan)), torch.randn(4, 3, 8, 8)
    assert smaller.side.in_channels == 4
    answer = smaller.train()(images)
    assert {name: value.shape for name, value in answer.items()} == {"out": (4, 4), "aux": (4, 4)}
    sum(value.sum() for value in answer.values()).backward()
    assert smaller.side.weight.grad.shape == (5, 4, 1, 1)
    assert smaller.eval()(images).shape == (4, 4)


def test_a_network_that_needs_more_for_training_says_so():
    class Detector(_Between):
        def forward(self, x, targets=None):
            if self.training and targets is None:
                raise ValueError("targets are missing")
            return super().forward(x)

    plan = find_groups(Detector(nn.Identity()), torch.randn(IMAGES))
    assert plan.names == ("a", "b", "c")
    assert "ValueError: targets are missing" in plan.notes[0] and "was not looked at" in plan.notes[0]


def test_looking_at_training_leaves_random_numbers_and_statistics_alone():
    model = ZOO["Auxiliary"]().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    find_groups(model, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(3), expected)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_numbers_drawn_inside_do_not_count_outside():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), float(torch.rand(1))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with randomness_restored(5):
        assert random.random(), np.random.rand()
        torch.rand(3)
    assert (random.random(), np.random.rand(), float(torch.rand(1))) == expected


def _written(x):
    out = x.new_zeros(x.size(0), x.size(1), 9, 9)
    out[:, :, 1:, 1:] = x
    return out


def _interleaved(x):
    out = torch.zeros(x.size(0), 2 * x.size(1), x.size(2), x.size(3), dtype=x.dtype)
    out[:, ::2], out[:, 1::2] = x, -x
    return out


@pytest.mark.parametrize(
    ("between", "wide"),
    [
        (lambda x: x + x.new_zeros(x.shape), 6),
        (lambda x: x + torch.zeros(x.shape, dtype=x.dtype), 6),
        (lambda x: x * x.new_full((x.size(0), x.size(1), 1, 1), 2.0), 6),
        (lambda x: x + torch.full_like(x, 0.5), 6),
        (lambda x: torch.cat([x, x.new_zeros(x.size(0), 2, x.size(2), x.size(3))], 1), 8),
        (lambda x: torch.cat([x, torch.zeros_like(x)], 1), 12),
        (_written, 6),
        (_interleaved, 12),
    ],
)
def test_tensors_made_from_a_size_follow_the_cut(between, wide):
    model = _Between(between, wide).eval()
    plan = find_groups(model, torch.randn(1, 3, 8, 8))
    assert plan.names == ("a", "b", "c") and plan.notes == ()
    assert difference(model.double(), _halved(plan), torch.randn(2, 3, 8, 8, dtype=torch.float64)) < 1e-10


class _TwoSizes(_Between):
    """What `d` makes meets zeros in the size of what `b` makes: neither can lose a filter without the other."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.d = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        x = self.d(x) + torch.zeros(x.shape, dtype=x.dtype)
        return self.linear(F.relu(self.c(x)).mean((2, 3)))


def test_equal_cuts_do_not_hide_sizes_that_hang_together():
    model = _TwoSizes()
    plan = find_groups(model, torch.randn(1, 3, 8, 8))
    assert plan.names == ("a", "c") and set(_reasons(plan)) == {"b", "d"}
    unchecked = find_groups(model, torch.randn(IMAGES), verify=False).groups
    both = {group: torch.arange(6) < 4 for group in unchecked if group.name in ("b", "d")}
    assert len(both) == 2
    assert difference(model.eval(), both, torch.randn(IMAGES)) < 1e-5, "together the sizes fit"


@pytest.mark.parametrize("images", [1, 12])
@pytest.mark.parametrize(
    ("between", "wide", "said"),
    [
        (lambda x: x + torch.zeros(6, 1, 1), 6, "sized by the data, as torch.zeros_like(x) is, it would follow"),
        (lambda x: torch.cat([x, x.new_zeros(len(x), 8 - x.size(1), 8, 8)], 1), 8, "a fixed number of zeros would"),
        (lambda x: x.reshape(-1, 6, 64).view(-1, 6, 8, 8), 6, r"reshapes to [-1, 6, 64]"),
    ],
)
def test_a_size_that_is_written_down_says_what_could_be_written(between, wide, said, images):
    plan = find_groups(_Between(between, wide), torch.randn(images, 3, 8, 8))
    assert plan.names == ("a", "c") and said in _reasons(plan)["b"]


@pytest.mark.parametrize("images", [1, 16])
def test_a_view_to_a_fixed_width_says_what_could_be_written(images):
    class Flat(_Between):
        def __init__(self):
            super().__init__(nn.Identity())
            self.linear = nn.Linear(5 * 16, 4)

        def forward(self, x):
            x = F.max_pool2d(self.c(F.relu(self.b(F.relu(self.a(x))))), 2)
            return self.linear(x.view(-1, 80))

    plan = find_groups(Flat(), torch.randn(images, 3, 8, 8))
    assert plan.names == ("a", "b")
    assert "reshapes to [-1, 80]" in _reasons(plan)["c"] and "x.flatten(1)" in _reasons(plan)["c"]


class _Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


@pytest.mark.parametrize(
    ("between", "named"),
    [(_Noise(), "'randn_like' in 'between'"), (lambda x: F.dropout(x, 0.3), "'bernoulli_'")],
)
def test_random_numbers_in_evaluation_are_named(between, named):
    plan = find_groups(_Between(between), torch.randn(1, 3, 8, 8))
    assert plan.names == ("a", "c"), "what the noise does not touch can be compared"
    assert "is random in evaluation mode" in _reasons(plan)["b"] and named in _reasons(plan)["b"]
    assert len(plan.notes) == 1 and named in plan.notes[0] and "changes from run to run" in plan.notes[0]


@pytest.mark.parametrize(
    ("between", "named"),
    [
        (lambda x: x * random.random(), "Python's random"),
        (lambda x: x * np.random.rand(), "numpy.random"),
    ],
)
def test_random_numbers_from_elsewhere_are_noticed(between, named):
    plan = find_groups(_Between(between), torch.randn(1, 3, 8, 8))
    assert plan.names == ("a", "b", "c") and named in plan.notes[0]


def test_a_generator_of_its_own_is_noticed_by_running_twice():
    generator = np.random.default_rng(0)
    plan = find_groups(_Between(lambda x: x * generator.random()), torch.randn(1, 3, 8, 8))
    assert plan.names == () and all("two runs differ" in reason for reason in _reasons(plan).values())


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x - x.mean(0, keepdim=True),
        lambda x: x / (1 + x.std(0, keepdim=True)),
        nn.BatchNorm2d(6, track_running_stats=False),
    ],
)
@pytest.mark.filterwarnings("ignore:std\\(\\)")  # of one image, while the network is followed
def test_answers_that_depend_on_the_batch_are_noted_and_checked_on_several_images(between):
    plan = find_groups(_Between(between), torch.randn(1, 3, 8, 8))
    assert plan.names == ("a", "b", "c") and plan.notes == (BATCH_MATTERS,)


def test_outputs_in_an_object_are_compared_and_kept():
    class Answer:
        def __init__(self, logits, features):
            self.logits, self.hidden = logits, [features]

    class Wrapped(_Between):
        def forward(self, x):
            features = self.c(F.relu(self.b(F.relu(self.a(x)))))
            return Answer(self.linear(features.mean((2, 3))), features)

    plan = find_groups(Wrapped(nn.Identity()), torch.randn(IMAGES))
    assert plan.names == ("a", "b") and _reasons(plan)["c"] == "its filters are the network's output"
    assert [value.shape for value in tensors_in(Wrapped(nn.Identity())(torch.randn(IMAGES)))] == [(2, 4), (2, 5, 8, 8)]


def test_a_network_that_answers_nan_says_so():
    plan = find_groups(_Between(lambda x: x / (x - x)), torch.randn(1, 3, 8, 8))
    assert plan.names == () and all("answers NaN on random inputs" in reason for reason in _reasons(plan).values())


class _Hidden(_Between):
    """Keeps its layers in an attribute that hides `nn.Module.modules`, and a number in one that hides `double`."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.modules, self.double = [self.a, self.b], 2


def test_attributes_that_hide_methods_of_a_module_do_no_harm():
    model, images = _Hidden(), torch.randn(IMAGES)
    plan = find_groups(model, images)
    assert plan.names == ("a", "b", "c")
    network = MaskedNetwork(model, plan.groups, images)
    with network.masked({"b": torch.ones(1, 6, dtype=torch.bool)}, 0) as run:
        assert torch.allclose(run(network.prefix(images)), model.eval()(images), atol=1e-6)


class _Colliding(nn.Module):
    """Names that are the same once their dots are underlines, and one that an evaluator likes to use itself."""

    def __init__(self):
        super().__init__()
        self.level2 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1))
        self.level2_0, self.level2_2 = nn.Conv2d(5, 7, 3, padding=1), nn.Conv2d(7, 4, 3, padding=1)
        self.repeated = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.repeated(F.relu(self.level2_2(F.relu(self.level2_0(F.relu(self.level2(x)))))).mean((2, 3)))


@pytest.mark.parametrize("stack", [False, True])
def test_names_that_collide_are_kept_apart(stack):
    model, images = _Colliding().eval(), torch.randn(5, 3, 8, 8)
    plan = find_groups(model, images[:1])
    assert plan.names == ("level2.0", "level2.2", "level2_0", "level2_2")
    for group in plan.groups:
        keep = torch.arange(group.n_filters) % 2 == 0
        network = MaskedNetwork(model, plan.groups, images[:3], stack=stack)
        assert network.stacks == stack and network.method == "split", network.why_whole
        frontier, masks = network.prefix(images), {group.name: torch.stack([keep, ~keep])}
        for index, mask in enumerate((keep, ~keep)):
            if stack:
                answer = network.together(masks)(frontier)[index]
            else:
                with network.masked(masks, index) as run:
                    answer = run(frontier)
            assert torch.allclose(answer, prune(model, {group: mask})(images), atol=1e-5)
