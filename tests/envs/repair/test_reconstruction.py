"""A cut network repaired in closed form: exact where exactness is possible, never worse in what it minimises."""

import copy

import pytest
import torch
from digits_task import make_task
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.groups.verification import randomised
from keepdrop.envs.networks.built_in import cifar_resnet, small_cnn
from keepdrop.envs.repair import reconstruction as module
from keepdrop.envs.repair.patches import inputs_at, obstacle, outputs_at, patches_at, regress
from keepdrop.envs.repair.reconstruction import Reconstruction, ReconstructionSettings
from keepdrop.envs.surgery.cutting import prune
from keepdrop.errors import UserError
from torch import nn
from torch.nn import functional as F
from zoo import IMAGES, ZOO

CONVS = {
    "plain": nn.Conv2d(3, 5, 3),
    "strided": nn.Conv2d(3, 5, (3, 1), stride=(2, 1), padding=(2, 0)),
    "dilated": nn.Conv2d(3, 5, 3, dilation=2, padding="same"),
    "1d": nn.Conv1d(3, 5, 4, stride=2, padding=1),
    "3d": nn.Conv3d(3, 5, 2, padding=1),
}


@pytest.mark.parametrize("places", [4, 10_000])
@pytest.mark.parametrize("name", CONVS)
def test_patches_times_the_weight_are_the_outputs(name, places):
    conv = CONVS[name]
    sizes = {1: (9,), 2: (8, 7), 3: (4, 5, 4)}[len(conv.kernel_size)]
    images = torch.randn(2, 3, *sizes)
    rows = patches_at(conv, images, places) @ conv.weight.reshape(5, -1).T + conv.bias
    torch.testing.assert_close(rows, outputs_at(conv(images), places), rtol=1e-4, atol=1e-5)
    assert len(rows) <= 2 * places


def test_a_linear_layer_is_its_own_rows():
    layer, x = nn.Linear(4, 3), torch.randn(6, 4)
    assert inputs_at(layer, x, 2) is x
    assert torch.equal(outputs_at(layer(x), 2), layer(x))


def test_regression_is_ridge_towards_the_prior_by_its_normal_equations():
    torch.manual_seed(0)
    x, y, prior = torch.randn(40, 3).double(), torch.randn(40, 2).double(), torch.randn(3, 2).double()
    ridge = 0.3
    w = regress(x, y, prior, ridge, intercept=False)
    strength = ridge * (x.T @ x).diagonal().mean()
    torch.testing.assert_close(x.T @ (x @ w - y) + strength * (w - prior), torch.zeros(3, 2).double())
    # An intercept that alone explains everything is found, and the weights stay at their prior of 0.
    w = regress(x, torch.full((40, 2), 5.0).double(), torch.zeros(3, 2).double(), 1e-9, intercept=True)
    torch.testing.assert_close(w, torch.tensor([[0.0, 0], [0, 0], [0, 0], [5, 5]]).double(), atol=1e-6, rtol=0)


def test_obstacles_have_a_reason():
    assert obstacle(nn.Conv2d(4, 4, 3), 4608) == ""
    assert "grouped" in obstacle(nn.Conv2d(4, 4, 3, groups=2), 4608)
    assert "padding mode" in obstacle(nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1), 4608)
    assert "more than 10" in obstacle(nn.Conv2d(4, 4, 3), 10) and "more than 3" in obstacle(nn.Linear(4, 2), 3)
    assert "neither" in obstacle(nn.ConvTranspose2d(4, 4, 3), 4608)


class Copies(nn.Module):
    """The second half of the first convolution's filters repeats the first: half of them can go for nothing."""

    def __init__(self, bias, norm):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.first.weight.data[4:] = self.first.weight.data[:4]
        self.first.bias.data[4:] = self.first.bias.data[:4]
        self.second = nn.Conv2d(8, 6, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        return self.linear(F.relu(self.norm(self.second(F.relu(self.first(x))))).mean((2, 3)))


@pytest.mark.parametrize(("bias", "norm"), [(True, False), (False, True), (False, False), (True, True)])
def test_filters_that_others_repeat_are_dropped_without_a_trace(bias, norm):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Copies(bias, norm).double().eval()
    images = torch.randn(16, 3, 6, 6, generator=generator, dtype=torch.float64)
    group = next(g for g in find_groups(model, images[:1]).groups if g.name == "first")
    keep = torch.arange(8) < 4
    settings = ReconstructionSettings(images=16, places=36, ridge=1e-10)
    repaired = Reconstruction(model, images, settings).cut({group: keep})
    fresh = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(repaired(fresh), model(fresh), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(prune(model, {group: keep})(fresh), model(fresh), atol=1e-2)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_network_of_the_zoo_is_repaired_or_said_to_be_untraceable(name):
    generator = torch.Generator().manual_seed(3)
    model = randomised(ZOO[name](), generator)
    images = torch.randn(24, *IMAGES[1:], generator=generator, dtype=torch.float64)
    groups = [g for g in find_groups(model, images[:1], verify=False).groups if g.n_filters > 1]
    before = copy.deepcopy(model.state_dict())
    choices = {group: torch.arange(group.n_filters) % 3 != 1 for group in groups[:1]}
    if not choices:
        pytest.skip("no group to prune")
    try:
        reconstruction = Reconstruction(model, images, ReconstructionSettings(images=24))
    except UserError as error:
        assert "cannot be traced" in str(error)
        return
    repaired = reconstruction.cut(choices)
    plain = prune(model, choices)
    assert {k: v.shape for k, v in repaired.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert repaired.training == model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    repaired.eval(), plain.eval(), model.eval()
    error, plain_error = ((net(images) - model(images)).square().mean() for net in (repaired, plain))
    assert error <= plain_error * 1.001


def test_layers_that_see_nothing_of_a_cut_keep_every_bit():
    generator = torch.Generator().manual_seed(2)
    model = randomised(cifar_resnet(8), generator).float().eval()
    images = torch.randn(8, 3, 16, 16, generator=generator)
    groups = find_groups(model, images[:1]).groups
    reconstruction = Reconstruction(model, images)

    def changed(*cut):
        choices = {
            group: torch.arange(group.n_filters) % 2 > 0 if group.name in cut else _whole(group) for group in groups
        }
        found = reconstruction.cut(choices).state_dict()
        return {name for name, value in model.state_dict().items() if not torch.equal(found[name], value)}

    names = [group.name for group in groups]
    assert changed() == set()
    assert names[-1] == "layer3.0.conv1"
    assert {name.rpartition(".")[0] for name in changed(names[-1])} == {
        *("layer3.0.conv1", "layer3.0.bn1"),  # cut
        *("layer3.0.conv2", "layer3.0.bn2", "linear"),  # repaired
    }


def _whole(group):
    return torch.ones(group.n_filters, dtype=torch.bool)


def test_a_residual_branch_makes_up_for_its_shortcut():
    generator = torch.Generator().manual_seed(1)
    model = randomised(cifar_resnet(8), generator)
    images = torch.randn(32, 3, 16, 16, generator=generator, dtype=torch.float64)
    reconstruction = Reconstruction(model, images)
    partners = {site.module: site.partner for site in reconstruction.sites.values()}
    assert all((partners[name] is not None) == name.endswith("conv2") for name in partners if "layer" in name)
    norms = {site.module: site.norm for site in reconstruction.sites.values()}
    assert norms["layer1.0.conv1"] == "layer1.0.bn1" and norms["linear"] is None


def test_frozen_parameters_and_modes_are_kept_and_repeating_gives_the_same_bits():
    task = make_task()
    model = copy.deepcopy(task.model).train()
    model.get_submodule("features.0" if hasattr(model, "features") else "conv1").weight.requires_grad_(False)
    group = task.groups[0]
    keep = torch.arange(group.n_filters) % 2 == 0
    images, _ = task.fit_images(64)
    one, two = (Reconstruction(model, images).cut({group: keep}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert one.training
    assert [p.requires_grad for p in one.parameters()] == [p.requires_grad for p in model.parameters()]


def test_accuracy_comes_back():
    task = make_task()
    choices = {group: torch.arange(group.n_filters) % 2 == 0 for group in task.groups}
    images, labels = task.reward_images

    def accuracy(model):
        with torch.no_grad():
            return float((model.eval()(images).argmax(1) == labels).float().mean())

    repaired = Reconstruction(task.model, task.fit_images(300)[0]).cut(choices)
    assert accuracy(repaired) > accuracy(prune(task.model, choices)) + 0.1


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.first(x)
        return (self.second(x) if x.sum() > 0 else x).mean((2, 3))


def test_bad_input_is_refused_in_one_sentence():
    with pytest.raises(UserError, match="cannot be traced"):
        Reconstruction(Branches(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(UserError, match="above 0"):
        ReconstructionSettings(images=0)
    with pytest.raises(UserError, match="above 0"):
        ReconstructionSettings(ridge=0.0)
    model = small_cnn(widths=(4, 4, 4)).eval()
    group = find_groups(model, torch.zeros(1, 1, 8, 8)).groups[0]
    with pytest.raises(UserError, match="keeps none"):
        Reconstruction(model, torch.randn(4, 1, 8, 8)).cut({group: torch.zeros(4, dtype=torch.bool)})


def test_what_does_not_fit_takes_fewer_images_or_places(monkeypatch):
    model, images = small_cnn().eval(), torch.randn(80, 1, 8, 8)
    whole = Reconstruction(model, images, ReconstructionSettings(images=80, places=6))
    assert len(whole.images) == 80 and whole.settings.places == 6
    first = next(each for each in model.modules() if isinstance(each, nn.Conv2d))
    monkeypatch.setattr(module, "VALUE_BYTES", 3 * 4 * first(images[:1]).numel() * 40)
    fewer = Reconstruction(model, images, ReconstructionSettings(images=80, places=6))
    assert torch.equal(fewer.images, images[:40]) and fewer.settings.places == 12
    monkeypatch.setattr(module, "SAMPLE_BYTES", 1)
    assert Reconstruction(model, images, ReconstructionSettings(images=80, places=6)).settings.places == 1
