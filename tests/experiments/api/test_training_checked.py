"""Training from Python: tried before the search, judged after it, the network as cut always at hand."""

import pytest
import torch
from digits_task import trained
from keepdrop import TrainSettings, prune
from keepdrop.envs.data.images import ArrayImages
from keepdrop.envs.data.objective import TOP1, with_objective
from keepdrop.envs.data.splits import Splits
from keepdrop.envs.networks.checkpoint import hash_state
from keepdrop.errors import Notice, UserError
from keepdrop.experiments.pruning.input_checks import check_fineness, try_network
from keepdrop.experiments.training.guarded import Judgement
from quick import CALL
from torch import nn

ONCE = TrainSettings(epochs=0.2, batch_size=64, lr=0.01)


@pytest.fixture(scope="module")
def given():
    model, splits = trained()
    return model, splits.fit, splits.report


class OnlyEvaluated(nn.Module):
    """A network whose training mode is broken."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        if self.training:
            raise RuntimeError("no training here")
        return self.inner(x)


@pytest.mark.filterwarnings("ignore::keepdrop.errors.Notice")
def test_a_network_that_cannot_be_trained_is_refused_before_the_search(given):
    model, fit, report = given
    told = []
    for asked in ({"finetune": ONCE}, {"recover": ONCE}):
        call = CALL | {"layers": ["inner.conv1"]} | asked
        with pytest.raises(UserError, match=r"cannot be trained \(RuntimeError: no training here\); prune without"):
            prune(OnlyEvaluated(model), fit, report, **call, progress=told.append)
    assert told == []
    prune(OnlyEvaluated(model), fit, report, **CALL | {"layers": ["inner.conv1"]})


@pytest.mark.filterwarnings("ignore::keepdrop.errors.Notice")
def test_a_frozen_network_is_pruned_and_fine_tuned(given):
    model, fit, report = given
    state = {name: value.requires_grad for name, value in model.named_parameters()}
    try:
        result = prune(model.requires_grad_(False), fit, report, **CALL | {"finetune": ONCE})
    finally:
        for name, value in model.named_parameters():
            value.requires_grad_(state[name])
    assert hash_state(result.model) != hash_state(result.cut) or result.finetuning.kept == "as cut"


def test_a_loop_that_ruins_the_network_leaves_it_as_cut(given):
    model, fit, report = given

    def ruin(network):
        torch.nn.init.zeros_(network.linear.weight)

    with pytest.warns(Notice, match="on the reward images\\): the network is kept as it was cut"):
        result = prune(model, fit, report, **CALL | {"finetune": ruin})
    assert hash_state(result.model) == hash_state(result.cut) and result.accuracy == result.pruned_accuracy
    assert isinstance(result.finetuning, Judgement) and result.facts()["finetuning"]["kept"] == "as cut"


def test_a_bound_finer_than_one_image_is_said():
    with pytest.warns(Notice, match=r"drop_bound is 0.002, and one of the 300 reward images is 0.0033: no image"):
        check_fineness(0.002, 300)
    for bound, count in ((0.0, 300), (1 / 300, 300), (0.02, 300)):
        check_fineness(bound, count)


def test_probabilities_are_told_from_logits_that_are_small_yet():
    """A network before its training answers from 0 to 1 by chance; one that ends in a sigmoid always does."""
    images = torch.randn(80, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    data = with_objective(ArrayImages(images, (torch.arange(80) % 2).float(), [0.0], [1.0], 0), TOP1)
    splits = Splits(data, data, data, {}, {}, {})
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1))
    with torch.no_grad():
        network[3].weight.mul_(0.01)
        network[3].bias.fill_(0.5)
    try_network(network, splits)
    with pytest.raises(UserError, match="which are probabilities, not logits"):
        try_network(nn.Sequential(network, nn.Sigmoid()), splits)
