"""The plain network inside wrappers, holders, masks and lazy modules; what came in stays as it was."""

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.checkpoint import hash_state, load_checkpoint
from keepdrop.envs.networks.unwrapping import plain_network
from keepdrop.errors import UserError
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel
from zoo import Viewed

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Compiled(nn.Module):
    """As `torch.compile` wraps a network, without the seconds that its import takes."""

    def __init__(self, network):
        super().__init__()
        self._orig_mod = network

    def forward(self, x):
        return self._orig_mod(x)


class Ema(nn.Module):
    """timm's ModelEmaV2: it holds the averaged network and has no forward."""

    def __init__(self, network):
        super().__init__()
        self.module, self.decay = network, 0.99


class Shadow:
    """No module at all."""

    def __init__(self, network):
        self.ema = network


class Standardising(nn.Module):
    """A wrapper that computes something: part of the network."""

    def __init__(self, network):
        super().__init__()
        self.module = network

    def forward(self, x):
        return self.module((x - 0.5) * 2)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(4)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).flatten(1))


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "torch.compile": Compiled,
    "Ema": Ema,
    "DataParallel, torch.compile": lambda network: nn.DataParallel(Compiled(network)),
}


@pytest.mark.parametrize("kinds", WRAPPERS)
def test_wrappers_are_taken_off_and_named(kinds):
    wrapped = WRAPPERS[kinds](Viewed())
    before = hash_state(wrapped)
    plain, notes = plain_network(wrapped)
    assert type(plain) is Viewed and plain(IMAGES).shape == (2, 4)
    assert notes == (f"The network came wrapped ({kinds}); it is pruned and given back plain, without the wrapper.",)
    with torch.no_grad():
        plain.conv1.weight.zero_()
    assert hash_state(wrapped) == before


@pytest.mark.slow
def test_torch_compile_itself():
    plain, notes = plain_network(torch.compile(network := Viewed()))
    assert type(plain) is Viewed and "torch.compile" in notes[0] and torch.equal(plain(IMAGES), network(IMAGES))


def test_an_object_that_holds_a_network():
    assert type(plain_network(Shadow(Viewed()))[0]) is Viewed
    with pytest.raises(UserError, match=r"model is a OrderedDict; expected a network, a torch\.nn\.Module\."):
        plain_network(Viewed().state_dict())


@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled])
def test_wrappers_of_parts_are_taken_off(wrap):
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
    answer = network(IMAGES)
    network[0] = wrap(network[0])
    plain, notes = plain_network(network)
    assert type(plain[0]) is nn.Conv2d and type(network[0]) is wrap and len(notes) == 1
    assert torch.equal(plain(IMAGES), answer)


def test_wrappers_that_compute_and_containers_stay():
    for network in (Standardising(Viewed()), nn.Sequential(nn.ModuleDict({"model": nn.Linear(2, 2)}))):
        plain, notes = plain_network(network)
        assert list(plain.state_dict()) == list(network.state_dict()) and notes == ()


def test_pruning_masks_are_made_permanent():
    network = Viewed()
    prune.random_unstructured(network.conv2, "weight", 0.5)
    prune.l1_unstructured(network.conv2, "weight", 0.2)
    prune.random_unstructured(network.fc1, "bias", 0.5)
    plain, notes = plain_network(network)
    assert plain.state_dict().keys() == Viewed().state_dict().keys()
    assert torch.equal(plain(IMAGES), network(IMAGES))
    assert "Masks of torch.nn.utils.prune on conv2.weight, fc1.bias were made permanent" in notes[0]
    assert "conv2.weight_orig" in network.state_dict()


def test_lazy_modules_get_their_sizes_from_one_image():
    network = Lazy().train()
    plain, notes = plain_network(network, IMAGES[:1])
    assert plain.conv.weight.shape == (6, 3, 3, 3) and plain.linear.in_features == 216 and plain.training
    assert notes == ("Lazy modules got their sizes from one image.",)
    assert type(network.conv) is nn.LazyConv2d
    with pytest.raises(UserError, match="Lazy has lazy modules, whose sizes nobody knows yet; run it on one image"):
        plain_network(Lazy())
    with pytest.raises(UserError, match="Lazy has lazy modules and fails on one image"):
        plain_network(Lazy(), torch.zeros(1, 3, 1, 1))


class LazyHead(Lazy):
    """The second half runs in training mode alone."""

    def __init__(self):
        super().__init__()
        self.known, self.aux = nn.BatchNorm2d(3), nn.Sequential(nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))

    def forward(self, x):
        x = self.known(x)
        return (super().forward(x), self.aux(x)) if self.training else super().forward(x)


def test_lazy_heads_of_training_get_their_sizes_without_moving_statistics():
    plain, _ = plain_network(LazyHead().eval(), IMAGES[:1] + 5)
    assert plain.aux[2].in_features == 192 and not plain.training
    for norm in (plain.known, plain.aux[0]):
        assert norm.running_mean.eq(0).all() and norm.num_batches_tracked == 0
    never = LazyHead()
    never.spare = nn.LazyLinear(3)
    with pytest.raises(UserError, match="lazy module 'spare' of LazyHead runs neither in evaluation nor in training"):
        plain_network(never, IMAGES[:1])


NORMS = {
    "weight": weight_norm,
    "spectral": spectral_norm,
    "weight, parametrised": parametrizations.weight_norm,
    "weight, dimension 1": lambda module: parametrizations.weight_norm(module, dim=1),
    "spectral, parametrised": parametrizations.spectral_norm,
}


def normalised(norm):
    """Its weights far from those it began with, so that what makes them matters."""
    torch.manual_seed(0)
    network = nn.Sequential(
        norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), norm(nn.ConvTranspose2d(6, 6, 3)), nn.Flatten(), norm(nn.Linear(384, 4))
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(20):
            network.train()(IMAGES)
    return network.eval()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_weight_and_spectral_norm_are_made_permanent(norm, tmp_path):
    network = normalised(norm)
    with torch.no_grad():
        expected = network(IMAGES)
        plain, notes = plain_network(network)
        torch.testing.assert_close(plain(IMAGES), expected)
        assert torch.equal(network(IMAGES), expected)  # what came in works as before
    assert notes[0].startswith("Weight or spectral norm of 0, 2, 4 was made permanent") and len(notes) == 1
    assert set(plain.state_dict()) == {f"{layer}.{key}" for layer in (0, 2, 4) for key in ("weight", "bias")}
    assert find_groups(plain, IMAGES[:1]).names == ("0", "2")
    for prefix in ("", "module.", "model."):
        torch.save(
            {"state_dict": {prefix + name: value for name, value in network.state_dict().items()}}, tmp_path / "w.pt"
        )
        fresh = plain_network(normalised(norm))[0]
        nn.init.zeros_(fresh[0].weight)
        load_checkpoint(fresh, tmp_path / "w.pt")
        torch.testing.assert_close(fresh(IMAGES), expected)


def test_groups_of_wrapped_and_of_lazy_networks():
    names = find_groups(Viewed(3, 4), IMAGES[:1]).names
    assert names and find_groups(nn.DataParallel(Viewed(3, 4)), IMAGES[:1]).names == names
    assert find_groups(Lazy(), IMAGES[:1]).names == ("conv",)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(kind):
    network = Viewed(3, 4).to(kind)
    plain, notes = plain_network(network)
    assert notes == (f"The network came in {str(kind)[6:]}; it is pruned and given back in float32.",)
    assert plain(IMAGES).dtype == torch.float32 and network.conv1.weight.dtype == kind
    torch.testing.assert_close(plain.conv1.weight, network.conv1.weight.float())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_and_quantised_networks_are_refused_by_name():
    with pytest.raises(UserError, match="model is a TorchScript module, whose layers cannot be cut"):
        plain_network(torch.jit.trace(Viewed(3, 4), IMAGES))
    with pytest.raises(UserError, match="Layer 'fc1' is quantised, and integers cannot be pruned"):
        plain_network(torch.ao.quantization.quantize_dynamic(Viewed(3, 4), {nn.Linear}))
