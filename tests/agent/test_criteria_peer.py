"""What the criteria say of a network, observation and all, against torch-pruning's, where it has them."""

import warnings

import pytest
import torch
from keepdrop.agent.criteria import scores
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.observation import STATISTIC_NAMES, observe
from torch import nn
from torch.nn import functional

torch_pruning = pytest.importorskip("torch_pruning", reason="the peer is not installed: pip install keepdrop[peers]")


class Chain(nn.Module):
    """Two convolutions, all there is to a group: producer, batch norm, consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 7, 3, bias=False), nn.BatchNorm2d(7)
        self.second, self.head = nn.Conv2d(7, 5, 3), nn.Linear(5, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(images)).relu()
        return self.head(self.second(hidden).mean((2, 3)))


@pytest.fixture(scope="module")
def chain() -> Chain:
    torch.manual_seed(0)
    model = Chain().eval()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model


def group_of(model: Chain, module: nn.Module, cut: object) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(model, torch.randn(1, 3, 8, 8))
    return graph.get_pruning_group(module, cut, list(range(7)))


IMAGES, LABELS = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(6) % 4


def ours(model: Chain, criterion: str) -> torch.Tensor:
    group = find_groups(model, IMAGES[:1]).groups[0]
    assert group.name == "first"
    seen = observe(model, group, IMAGES, LABELS).as_dict()
    return scores({name: torch.from_numpy(each) for name, each in seen.items()}, STATISTIC_NAMES, criterion)


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude(chain: Chain, criterion: str, power: int) -> None:
    """torch-pruning sums |w|^p without the root, over the first layer of the group."""
    peer = torch_pruning.importance.GroupMagnitudeImportance(p=power, group_reduction="first", normalizer=None)
    theirs = peer(group_of(chain, chain.first, torch_pruning.prune_conv_out_channels))
    assert ours(chain, criterion) ** power == pytest.approx(theirs.double(), rel=1e-5)


def test_bn_scale(chain: Chain) -> None:
    peer = torch_pruning.importance.BNScaleImportance(group_reduction="mean", normalizer=None)
    theirs = peer(group_of(chain, chain.first, torch_pruning.prune_conv_out_channels))
    assert ours(chain, "bn_scale") == pytest.approx(theirs.double(), rel=1e-6)


def test_fpgm() -> None:
    """Equal where weights are not negative: torch-pruning takes distances of |w|^p, He et al. (eq. 4) of w itself."""
    torch.manual_seed(1)
    model = Chain().eval()
    with torch.no_grad():
        model.first.weight.abs_()
    peer = torch_pruning.importance.FPGMImportance(p=1, group_reduction="first", normalizer=None)
    theirs = peer(group_of(model, model.first, torch_pruning.prune_conv_out_channels))
    assert ours(model, "fpgm") == pytest.approx(theirs.double(), rel=1e-4)
    with torch.no_grad():
        model.first.weight[0].neg_()
    theirs = peer(group_of(model, model.first, torch_pruning.prune_conv_out_channels))
    assert int(ours(model, "fpgm").argmax()) == 0  # now the farthest from all others, which |w| does not see
    assert ours(model, "fpgm") != pytest.approx(theirs.double(), rel=1e-2)


def test_taylor(chain: Chain) -> None:
    """Image by image both are one number: sum of weight x gradient over what reads a filter = activation x gradient.

    torch-pruning takes the absolute value after summing over the images of its backward pass; the paper (eq. 8) and we
    take it for each image, so it is asked image by image here.
    """
    peer = torch_pruning.importance.GroupTaylorImportance(group_reduction="first", normalizer=None, multivariable=True)
    group = group_of(chain, chain.second, torch_pruning.prune_conv_in_channels)
    theirs = torch.zeros(7)
    for image, label in zip(IMAGES, LABELS, strict=True):
        chain.zero_grad()
        functional.cross_entropy(chain(image[None]), label[None]).backward()
        theirs += peer(group) / len(IMAGES)
    chain.zero_grad()
    assert ours(chain, "taylor") == pytest.approx((theirs / theirs.norm()).double(), rel=1e-4)
