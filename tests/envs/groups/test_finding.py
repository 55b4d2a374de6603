"""Groups are found, named and explained; nothing about the network changes."""

import copy

import numpy as np
import pytest
import torch
from keepdrop.envs.groups.finding import LOOKS_AT_DATA, find_groups
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn, vgg16_bn
from keepdrop.envs.surgery.filter_group import Cut, FilterGroup, select_groups
from keepdrop.errors import UserError
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import IMAGES, ZOO

# name -> {root: (number of filters, other producers)}; every convolution that is missing must be skipped.
EXPECTED = {
    "ResidualStream": {
        "stem": (8, {"outer1"}),
        "inner1": (6, set()),
        "inner2": (6, set()),
        "outer2": (12, {"projection"}),
    },
    "PadShortcut": {"stem": (6, {"outer"}), "inner": (10, set())},
    "Concat": {"stem": (5, set()), "left": (7, set()), "right": (4, set()), "head": (6, {"other"})},
    "Depthwise": {"stem": (6, {"project"}), "expand": (12, set())},
    "Grouped": {"reduce": (3, set()), "grouped": (4, set()), "restore": (6, set())},
    "Reused": {"stem": (8, {"again"}), "inner": (6, set())},
    "Chunked": {"gated": (6, set()), "split": (5, set()), "left": (4, {"right"})},
    "Shuffled": {"stem": (4, set()), "head": (8, set())},
    "Flattened": {"conv": (6, set())},
    "Viewed": {"conv1": (6, set()), "conv2": (8, set())},
    "MaxOverChannels": {"conv1": (6, set()), "conv3": (8, set())},
    "Gated": {"stem": (8, {"excite"}), "squeeze": (4, set()), "middle": (10, {"up"})},
    "Decoder": {"down": (6, set()), "up": (4, set()), "grouped": (6, set())},
    "Norms": {"stem": (12, set()), "middle": (4, set())},
    "PixelShuffle": {"stem": (4, set()), "head": (6, set())},
    "Branching": {"head": (6, set())},
    "Extended": {"first": (6, set()), "second": (5, set())},
    "OneDimensional": {"stem": (8, set()), "head": (6, set())},
    "ThreeDimensional": {"stem": (6, set()), "head": (6, set())},
    "LayerScaled": {"wide": (12, set()), "head": (6, set())},
    "Vectors": {"stem": (8, {"again"}), "head": (6, set())},
    "MadeWeights": {"stem": (4, set()), "middle": (6, set()), "head": (6, set()), "normed": (5, set())},
    "Recurrent": {"stem": (6, set()), "side": (7, set())},
    "Auxiliary": {"stem": (6, set()), "body": (8, set())},
    "Tied": {"stem": (8, {"first", "second", "up"}), "down": (6, set()), "head": (5, set())},
    "MadeTensors": {"stem": (6, set()), "middle": (7, set()), "head": (5, set())},
    "Attending": {"stem": (7, set()), "wide": (10, set())},
    "Unpooled": {"stem": (6, {"back"}), "middle": (5, set()), "head": (7, set())},
}


@pytest.mark.parametrize("name", ZOO)
def test_groups_of_hand_written_networks(name):
    plan = find_groups(ZOO[name](), torch.randn(IMAGES))
    found = {g.name: (g.n_filters, {cut.module for cut in g.producers[1:]}) for g in plan.groups}
    assert found == EXPECTED[name]


def test_first_convs_and_stream_of_resnet20():
    plan = find_groups(cifar_resnet(20), torch.randn(1, 3, 32, 32))
    firsts = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    assert list(plan.names) == ["conv1", *firsts]
    assert [g.n_filters for g in plan.groups] == [16] + [16] * 3 + [32] * 3 + [64] * 3
    stream = plan.groups[0]
    # Zero padding puts the old 16 channels in the middle of the new 32, and those in the middle of the 64.
    rows = {(cut.module, cut.axis): cut.channels[:, 0].tolist() for cut in stream.cuts}
    assert rows["layer2.0.conv2", "out"] == list(range(8, 24))
    assert rows["layer3.1.conv1", "in"] == list(range(24, 40))
    assert rows["linear", "in"] == list(range(24, 40))
    assert not plan.skipped


class ChannelsLastInside(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(memory_format=torch.channels_last))


def test_the_memory_order_of_images_and_weights_hides_no_stream():
    """Images of an array (n, height, width, channels) are channels-last, as `npz` and datasets give them."""
    images = torch.rand(1, 8, 8, 3).permute(0, 3, 1, 2)
    model = cifar_resnet(8)
    expected = find_groups(model, images.contiguous()).names
    assert expected[0] == "conv1" and len(expected) == 4
    assert find_groups(model, images).names == expected
    inside = find_groups(ChannelsLastInside(cifar_resnet(8)), images.contiguous()).names
    assert inside == tuple(f"model.{name}" for name in expected)
    assert find_groups(model.to(memory_format=torch.channels_last), images).names == expected


def test_plain_networks_have_one_group_a_convolution():
    plan = find_groups(vgg16_bn(), torch.randn(1, 3, 32, 32), verify=False)
    assert [g.n_filters for g in plan.groups] == [64, 64, 128, 128, 256, 256, 256] + [512] * 6
    plan = find_groups(small_cnn(), torch.randn(1, 1, 8, 8))
    assert list(plan.names) == ["conv1", "conv2", "conv3", "conv4", "conv5"]
    assert [(c.module, c.axis, c.kind) for c in plan.groups[0].cuts] == [
        ("conv1", "out", "producer"),
        ("bn1", "out", "pass"),
        ("conv2", "in", "consumer"),
    ]


def test_flattened_filter_owns_all_its_positions():
    (group,) = find_groups(ZOO["Flattened"](), torch.randn(IMAGES)).groups
    assert group.consumers[0].channels.tolist() == np.arange(6 * 16).reshape(6, 16).tolist()


def test_agrees_with_torch_pruning_where_that_is_exact():
    tp = pytest.importorskip("torch_pruning")
    model = cifar_resnet(8).eval()
    for name in ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"):
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=torch.randn(1, 3, 32, 32))
        module = model.get_submodule(name)
        theirs = graph.get_pruning_group(module, tp.prune_conv_out_channels, list(range(module.out_channels)))
        names = {id(each): key for key, each in model.named_modules()}
        expected = {names[id(dep.target.module)] for dep, _ in theirs if id(dep.target.module) in names}
        (group,) = select_groups(find_groups(model, torch.randn(1, 3, 32, 32), verify=False), [name])
        assert {cut.module for cut in group.cuts} == expected


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(training):
    model = ZOO["ResidualStream"]().train(training)
    model.inner1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    find_groups(model, torch.randn(IMAGES))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training == training for module in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["inner1.weight"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class _Odd(nn.Module):
    """A network with one thing that cannot be pruned, between two convolutions that can."""

    def __init__(self, odd):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 5, 1)
        self.shared = self.again = nn.Parameter(torch.ones(6, 1, 1))
        self.norm = nn.GroupNorm(1, 6)
        self.odd = odd
        self.linear = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.odd(self, self.b(F.relu(self.a(x))))
        return self.linear(F.relu(self.c(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (lambda net, x: x * net.shared, "meet channels that cannot be removed"),
        (lambda net, x: F.group_norm(x, 3), "number of groups of a GroupNorm written by hand"),
        (lambda net, x: net.norm(x), "GroupNorm of one group mixes"),
        (lambda net, x: x.softmax(1), "'_softmax' mixes its channels"),
        (lambda net, x: x / x.norm(dim=1, keepdim=True), "mixes its channels"),
        (lambda net, x: F.layer_norm(x, x.shape[1:]), "a LayerNorm mixes its channels"),
        (lambda net, x: torch.cumsum(x, 1), "'cumsum' mixes its channels"),
        (lambda net, x: torch.einsum("bchw,cd->bdhw", x, torch.eye(6)), "not one that keeps channels apart"),
        (lambda net, x: torch.cat(torch.split(x, 3, dim=1)[::-1], 1), "does not"),
        (lambda net, x: torch.cat([x[:, :2].relu(), x[:, 2:]], 1), "does not"),
        (lambda net, x: F.conv2d(x, net.b.weight), "is not one that keeps channels apart"),
        (lambda net, x: torch.fft.fft2(x).abs(), "is not one that keeps channels apart"),
        (lambda net, x: x + torch.zeros(6, 1, 1), "sized by the data, as torch.zeros_like(x) is"),
    ],
)
def test_an_operation_that_cannot_be_followed_costs_only_its_group(odd, reason):
    plan = find_groups(_Odd(odd), torch.randn(2, 3, 4, 4))
    # `a` is read by `b`, whose weights one of the cases uses behind the module's back.
    assert set(plan.names) - {"a"} == {"c"}
    assert "a" in plan.names or "does not run without" in next(s.reason for s in plan.skipped if s.name == "a")
    (skipped,) = [item for item in plan.skipped if item.name == "b"]
    assert reason in skipped.reason


class _Norm(nn.Module):
    """Batch norm written by hand."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.gain, self.shift, self.training)


def _table(net, x):
    return (x.flatten(2).transpose(1, 2) + net.held(torch.arange(16))).transpose(1, 2).reshape(x.shape)


def _of_one_head(net, x):
    rows = x.flatten(2)
    return (rows @ torch.softmax(net.odd_key(x).flatten(2), -1).mean(1, keepdim=True).mT).unsqueeze(3)


@pytest.mark.parametrize(
    ("held", "use", "cuts"),
    [
        (nn.Parameter(torch.ones(6, 1, 1)), lambda net, x: x * net.held.sigmoid(), {("", "held:0")}),
        (nn.Parameter(torch.ones(1, 6, 1, 1)), lambda net, x: torch.maximum(x, net.held), {("", "held:1")}),
        (nn.Parameter(torch.ones(6)), lambda net, x: F.prelu(x, net.held), {("", "held:0")}),
        (nn.Parameter(torch.ones(6)), lambda net, x: (x.movedim(1, 3) * net.held).movedim(3, 1), {("", "held:0")}),
        (nn.Parameter(torch.ones(6, 4, 4)), lambda net, x: x + net.held, {("", "held:0")}),
        (nn.Parameter(torch.ones(4)), lambda net, x: x * net.held, set()),  # a number per column
        (nn.Parameter(torch.ones(2)), lambda net, x: x * net.held[0], set()),
        (nn.Embedding(16, 6), _table, {("held", "weight:1")}),
        (torch.linspace(0, 1, 6), lambda net, x: x - net.held[:, None, None], {("", "held:0")}),
        (_Norm(), lambda net, x: net.held(x), {("held", f"{key}:0") for key in ("gain", "shift", "mean", "var")}),
        (None, _of_one_head, set()),
    ],
)
def test_what_a_module_holds_per_channel_is_cut_with_the_filters(held, use, cuts):
    model = _Odd(use)
    model.held, model.odd_key = held, nn.Conv2d(6, 3, 1)
    (group,) = [each for each in find_groups(model, torch.randn(2, 3, 4, 4)).groups if each.name == "b"]
    assert group.n_filters == 6
    assert {(cut.module, cut.axis) for cut in group.cuts if cut.kind == "pass"} == cuts
    assert "c" in {cut.module for cut in group.consumers}


class _Steps(nn.Module):
    """A convolution read by something that looks at more than one step."""

    def __init__(self, layer, use):
        super().__init__()
        self.conv, self.layer, self.use, self.linear = nn.Conv1d(3, 6, 3, padding=1), layer, use, nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.use(self.layer, F.relu(self.conv(x))))


@pytest.mark.parametrize(
    ("layer", "use", "reason"),
    [
        (nn.GRU(8, 4), lambda gru, x: gru(x)[0].mean(1), "reads its channels as steps"),
        (nn.GRU(6, 6), lambda gru, x: gru(x.movedim(2, 0), x.mean(2)[None])[0].mean(0), "first state of a recurrent"),
        (nn.MultiheadAttention(6, 2), lambda att, x: att(*[x.movedim(2, 0)] * 3)[0].mean(0), "as many channels as it"),
        (
            None,
            lambda _, x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT).mean(1),
            "keeps channels apart",
        ),
    ],
)
def test_readers_that_are_not_linear_are_named(layer, use, reason):
    model = _Steps(layer, use)
    model(torch.randn(2, 3, 8))
    plan = find_groups(model, torch.randn(2, 3, 8))
    assert plan.names == () and reason in plan.skipped[0].reason


def test_outputs_are_never_prunable():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            return {"out": self.head(F.relu(self.body(x))), "aux": x}

    plan = find_groups(Segmenter(), torch.randn(2, 3, 4, 4))
    assert plan.names == ("body",)
    assert [(s.name, s.reason) for s in plan.skipped] == [("head", "its filters are the network's output")]


def test_several_inputs_and_keyword_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.linear = nn.Conv2d(3, 6, 1), nn.Conv2d(1, 6, 1), nn.Linear(6, 2)

        def forward(self, image, *, depth=None):
            return self.linear(F.relu(self.left(image) + self.right(depth)).mean((2, 3)))

    inputs = {"image": torch.randn(2, 3, 4, 4), "depth": torch.randn(2, 1, 4, 4)}
    (group,) = find_groups(Two(), inputs).groups
    assert [cut.module for cut in group.producers] == ["left", "right"]


class _ByImage(nn.Module):
    """Looks at the image, outside all channels, to choose who reads the stem."""

    def __init__(self):
        super().__init__()
        self.stem, self.bright, self.dark = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1)
        self.tail, self.linear = nn.Conv2d(5, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        head = self.bright if x.mean() > 0.5 else self.dark
        return self.linear(self.tail(head(self.stem(x).relu()).relu()).mean((2, 3)))


def test_a_path_chosen_by_the_data_is_not_forgotten():
    """The example goes through `dark` alone: the stem's other reader would break if it were cut."""
    plan = find_groups(_ByImage(), torch.zeros(2, 3, 4, 4))
    assert plan.names == ("tail",)
    skipped = {item.name: item.reason for item in plan.skipped}
    assert "does not run without some of its filters" in skipped["stem"] and "does not run on the" in skipped["bright"]
    assert plan.notes == (LOOKS_AT_DATA,)
    # Unchecked, it would have been offered.
    assert "stem" in find_groups(_ByImage(), torch.zeros(2, 3, 4, 4), verify=False).names
    assert find_groups(ZOO["Branching"](), torch.randn(IMAGES)).notes == (LOOKS_AT_DATA,)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "Branching"])
def test_other_networks_do_not_look_at_their_data(name):
    assert find_groups(ZOO[name](), torch.randn(IMAGES), verify=False).notes == ()


def test_of_weights_made_filter_by_filter_the_filters_can_go_and_what_they_read_cannot():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    class Net(nn.Module):
        def __init__(self, middle):
            super().__init__()
            self.a, self.middle, self.c, self.linear = nn.Conv2d(3, 6, 1), middle, nn.Conv2d(6, 6, 1), nn.Linear(6, 2)

        def forward(self, x):
            return self.linear(self.c(self.middle(self.a(x))).mean((2, 3)))

    for middle in (Standardised(6, 6, 1), torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1))):
        plan = find_groups(Net(middle), torch.randn(2, 3, 4, 4))
        assert plan.names == ("middle", "c")
        (skipped,) = plan.skipped
        assert skipped.name == "a" and "makes its weight out of all of a filter" in skipped.reason
    plan = find_groups(Net(torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1))), torch.randn(2, 3, 4, 4))
    assert plan.names == ("c",) and {item.name for item in plan.skipped} == {"a", "middle"}


def test_a_network_that_does_not_run_is_refused():
    with pytest.raises(
        UserError, match=r"does not run on the example input \(RuntimeError: .* give one that its forward accepts"
    ):
        find_groups(small_cnn(), torch.randn(1, 3, 8, 8))


def test_selection_by_pattern_and_its_errors():
    plan = find_groups(cifar_resnet(8), torch.randn(1, 3, 32, 32), verify=False)
    assert select_groups(plan, None) == plan.groups
    assert [g.name for g in select_groups(plan, ["layer3.*", "layer1.0.conv1"])] == ["layer1.0.conv1", "layer3.0.conv1"]
    with pytest.raises(
        UserError, match=r"No prunable layer is called 'layer1.0.conv'; the nearest are 'layer1.0.conv1'"
    ):
        select_groups(plan, ["layer1.0.conv"])
    with pytest.raises(UserError, match=r"'layer1.0.conv2' go together with group 'conv1'; ask for 'conv1'"):
        select_groups(plan, ["layer1.0.conv2"])
    with pytest.raises(UserError, match="list of layers is empty"):
        select_groups(plan, [])


def test_a_layer_of_one_filter_is_explained():
    plan = find_groups(small_cnn(widths=(1, 4)), torch.randn(1, 1, 8, 8))
    with pytest.raises(UserError, match="Layer 'conv1' cannot be pruned: it has a single filter to decide on"):
        select_groups(plan, ["conv1"])


def test_nothing_prunable_says_why():
    plan = find_groups(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.randn(1, 3, 4, 4))
    with pytest.raises(
        UserError, match=r"No filter group of this network can be pruned \(0: its filters are the network's out"
    ):
        select_groups(plan, None)


def test_cuts_and_groups_check_themselves():
    with pytest.raises(ValueError, match="distinct"):
        Cut("conv", "out", np.array([[0], [0]]), "producer")
    with pytest.raises(ValueError, match="has 3 filters"):
        FilterGroup("conv", 3, (Cut("conv", "out", np.array([[0], [1]]), "producer"),))
