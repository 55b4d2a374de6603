"""Auxiliary heads: networks that answer with several outputs in training mode, in every shape that is met."""

from collections import namedtuple

import pytest
import torch
from keepdrop.envs.data.sources import ArrayImages
from keepdrop.errors import UserError
from keepdrop.experiments.training.heads import Heads, main_output
from keepdrop.experiments.training.loop import TrainSettings, fit_network
from torch import nn
from torch.nn import functional

Several = namedtuple("Several", ["side", "logits"])
FORMS = {
    "tuple": lambda main, side: (main, side),
    "named tuple": lambda main, side: Several(side, main),
    "list, main last": lambda main, side: [side, main],
    "dictionary": lambda main, side: {"aux": side, "out": main, "features": side.sum()},
    "with None": lambda main, side: (main, None, side),
}
ONCE = TrainSettings(epochs=1, batch_size=8, lr=0.1, momentum=0.0, weight_decay=0.0, warmup=0.0, schedule="constant")


class TwoHeads(nn.Module):
    """Two heads on one stem; in evaluation mode the main one alone."""

    def __init__(self, form, dropout=0.0):
        super().__init__()
        self.stem, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(dropout)
        self.main, self.side, self.form = nn.Linear(4, 3), nn.Linear(4, 3), form

    def forward(self, x):
        features = self.drop(functional.relu(self.norm(self.stem(x))).mean((2, 3)))
        main = self.main(features)
        return self.form(main, self.side(features)) if self.training else main


def images(n_images=8):
    generator = torch.Generator().manual_seed(0)
    return ArrayImages(
        torch.randn(n_images, 1, 8, 8, generator=generator), torch.arange(n_images) % 3, (0.0,), (1.0,), 3
    )


def network(form, dropout=0.0):
    torch.manual_seed(0)
    return TwoHeads(form, dropout)


@pytest.mark.parametrize("form", FORMS)
def test_one_step_is_that_of_the_weighed_losses(form):
    data, ours, expected = images(), network(FORMS[form]), network(FORMS[form])
    fit_network(ours, data, ONCE, seed=0)
    x, y = data.batch(torch.arange(8))
    expected.form = lambda main, side: (main, side)
    main, side = expected.train()(x)
    (functional.cross_entropy(main, y) + 0.3 * functional.cross_entropy(side, y)).backward()
    for name in ("stem", "main", "side"):
        weight = expected.get_submodule(name).weight
        torch.testing.assert_close(ours.get_submodule(name).weight, weight - 0.1 * weight.grad)


def test_auxiliary_zero_leaves_the_side_head_alone():
    model = network(FORMS["tuple"])
    before = model.side.weight.clone()
    fit_network(model, images(), TrainSettings(epochs=1, batch_size=8, lr=0.1, weight_decay=0.0, auxiliary=0.0), seed=0)
    assert torch.equal(model.side.weight, before)


def test_the_main_output_is_found_behind_dropout_without_a_trace():
    model = network(FORMS["list, main last"], dropout=0.5).train()
    x, state = torch.randn(4, 1, 8, 8), {name: value.clone() for name, value in model.state_dict().items()}
    assert main_output(model, x) == 1 and all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_maps_of_another_size_are_brought_to_the_main_ones():
    main, side = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 4, 4, requires_grad=True)
    heads = Heads(nn.Identity())
    heads._main = 0
    answers = heads([main, side, torch.randn(2, 7, 4, 4, requires_grad=True)], main)
    assert answers.main is main and [value.shape for value in answers.auxiliary] == [main.shape]


def test_answers_without_the_one_of_evaluation_are_refused():
    model = network(lambda main, side: {"loss": main.sum()})
    with pytest.raises(UserError, match=r"In training mode the network returns \(\), and \(2, 3\) in evaluation mode"):
        fit_network(model, images(), ONCE, seed=0)
