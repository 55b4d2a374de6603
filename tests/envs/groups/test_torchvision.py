"""torchvision's classification networks: found, cut and masked exactly; skipped where torchvision is absent."""

import pytest
import torch
from answered import logits_of
from keepdrop.envs.evaluation.masked_network import MaskedNetwork
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.groups.verification import difference
from keepdrop.envs.surgery.cutting import prune

# name: groups, convolutions left alone (auxiliary classifiers, which do not run in evaluation mode; a stage of
# ShuffleNet whose seven shuffles tie all of its channels to one)
QUICK = {
    "googlenet": (57, 2),
    "mnasnet0_5": (25, 0),
    "mobilenet_v3_small": (26, 0),
    "regnet_x_400mf": (49, 0),
    "resnet18": (12, 0),
    "shufflenet_v2_x0_5": (20, 9),
    "squeezenet1_1": (25, 1),
}
SLOW = [
    "alexnet", "convnext_tiny", "densenet121", "densenet161", "efficientnet_b0", "efficientnet_b1", "efficientnet_b4",
    "efficientnet_v2_s", "inception_v3", "maxvit_t", "mnasnet1_0", "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_large",
    "regnet_x_1_6gf", "regnet_x_800mf", "regnet_y_1_6gf", "regnet_y_400mf", "regnet_y_800mf", "regnet_y_3_2gf",
    "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "shufflenet_v2_x1_0", "shufflenet_v2_x2_0",
    "squeezenet1_0", "vgg11", "vgg11_bn", "vgg16_bn", "wide_resnet50_2",
]  # fmt: skip


@pytest.fixture
def network(torchvision, coverage_script):
    def make(name):
        torch.manual_seed(0)
        model = coverage_script.build("torchvision", name).eval()
        return model, torch.randn(2, 3, *[coverage_script.side(name)] * 2)

    return make


def _keep(group, generator):
    keep = torch.rand(group.n_filters, generator=generator) < 0.6
    keep[torch.randint(group.n_filters, (1,), generator=generator)] = True
    return keep


def _chosen(plan, generator, n):
    """Masks of all groups at once, and of `n` groups alone, spread over the network."""
    choices = {group: _keep(group, generator) for group in plan.groups}
    return [choices, *({group: choices[group]} for group in plan.groups[:: max(1, len(plan.groups) // n)])]


@pytest.mark.parametrize("name", QUICK)
def test_quick(name, network):
    model, images = network(name)
    plan = find_groups(model, images[:1], verify=False)
    assert (len(plan.groups), len(plan.skipped)) == QUICK[name]
    generator = torch.Generator().manual_seed(1)
    for choices in _chosen(plan, generator, 2):
        assert difference(model, choices, images) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_masked_equals_pruned(name, network):
    model, images = network(name)
    plan = find_groups(model, images[:1])
    model, images = model.double(), images.double()
    generator = torch.Generator().manual_seed(2)
    for choices in _chosen(plan, generator, 4):
        assert difference(model, choices, images) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "shufflenet_v2_x0_5", "regnet_y_400mf", "densenet121", "mnasnet0_5"])
def test_split_evaluation(name, network):
    model, images = network(name)
    group = find_groups(model, images[:1]).groups[-1]
    network = MaskedNetwork(model, [group], images)
    assert network.method == "split", network.why_whole
    keep = _keep(group, torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = prune(model, {group: keep})(images)
    got = logits_of(network, network.prefix(images), {group.name: keep[None]})[0]
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_partners_of_a_refused_group_say_which_one(network):
    model, images = network("shufflenet_v2_x0_5")
    reasons = {item.name: item.reason for item in find_groups(model, images[:1], verify=False).skipped}
    single = "it has a single filter to decide on, which must stay"
    assert reasons["stage3.0.branch1.2"] == single
    assert reasons["stage3.4.branch2.5"] == f"it goes together with 'stage3.0.branch1.2': {single}"


def test_a_row_of_the_coverage_page_merges_partners(coverage_script):
    cut = "the network does not run without some of its filters"
    reasons = {f"it goes together with 'a': {cut} (RuntimeError: 3 | 4)": 2, f"{cut} (RuntimeError: 3 | 4)": 1}
    row = {"side": 64, "found": 3, "prunable": 2, "convs_prunable": 2, "convs": 5, "seconds": 0.25}
    row |= {"reasons": reasons, "examples": dict.fromkeys(reasons, "a")}
    assert coverage_script.line("timm/net", row) == f"| net | 64 | 3 | 2 | 2 / 5 | 0.2 | 3: {cut} (`a`) |"
    assert coverage_script.line("timm/net", {"failed": "x"}) == "| net | | | | | | failed: x |"
