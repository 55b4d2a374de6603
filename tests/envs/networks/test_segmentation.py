"""The built-in segmentation networks: shapes, tracing, groups across encoder and decoder, refusals."""

import re

import pytest
import torch
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.networks.segmentation import fcn, segnet
from keepdrop.envs.surgery.cutting import prune
from keepdrop.errors import UserError
from torch import nn


@pytest.mark.parametrize("build", [fcn, segnet])
def test_traceable_and_traced_equals_eager(build):
    torch.manual_seed(0)
    model, images = build(5, 3, (4, 6, 8)).eval(), torch.randn(2, 3, 32, 48)
    logits = model(images)
    assert logits.shape == (2, 5, 32, 48)
    assert torch.equal(torch.fx.symbolic_trace(model)(images), logits)
    assert not any(getattr(module, "inplace", False) for module in model.modules())


def test_groups_of_a_segnet_reach_over_its_pooling_indices():
    plan = find_groups(segnet(5, 3, (4, 6, 8)).eval(), torch.randn(1, 3, 16, 16))
    found = {group.name: {cut.module for cut in group.producers[1:]} for group in plan.groups}
    assert found == {
        "encoder.0.0": set(),
        "encoder.0.3": {"decoder.1.3"},
        "encoder.1.0": set(),
        "encoder.1.3": {"decoder.0.3"},
        "encoder.2.0": set(),
        # The coarsest features are put back by their own indices.
        "encoder.2.3": set(),
        "decoder.0.0": set(),
        "decoder.1.0": set(),
        "decoder.2.0": set(),
        "decoder.2.3": set(),
    }
    assert [each.name for each in plan.skipped] == ["score"]


@pytest.mark.parametrize("build", [fcn, segnet])
def test_filters_that_make_nothing_go_without_a_trace(build):
    """Their batch normalisation makes zeros of them; encoder and decoder are cut at once, and the answer stays."""
    torch.manual_seed(1)
    model, images = build(5, 3, (4, 6, 8)).eval(), torch.randn(2, 3, 16, 16)
    plan, choices = find_groups(model, images[:1]), {}
    for group in plan.groups:
        keep = torch.arange(group.n_filters) % 3 != 1
        choices[group] = keep
        for cut in group.producers:
            stage, _, place = cut.module.rpartition(".")
            norm = model.get_submodule(f"{stage}.{int(place) + 1}")
            assert isinstance(norm, nn.BatchNorm2d)
            with torch.no_grad():
                norm.weight[~keep], norm.bias[~keep] = 0.0, 0.0
    smaller = prune(model, choices)
    assert smaller(images).allclose(model(images), atol=1e-5)
    assert sum(each.numel() for each in smaller.parameters()) < 0.7 * sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: fcn(widths=()), "fcn needs at least one width of 1 or more, got widths=()"),
        (lambda: segnet(widths=(8, 4)), "segnet needs widths that do not fall, got widths=(8, 4)"),
        (lambda: segnet(widths=(0, 4)), "segnet needs at least one width of 1 or more, got widths=(0, 4)"),
    ],
)
def test_impossible_sizes_are_refused(build, text):
    with pytest.raises(UserError, match=re.escape(text)):
        build()
