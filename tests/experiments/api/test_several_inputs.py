"""Pairs in and several outputs out, from `prune` to the file, the export and the user's own loop."""

from dataclasses import replace

import pytest
import torch
from keepdrop import Settings, TrainSettings, UserError, load_pruned, prune
from keepdrop.envs.data.sources import digits
from keepdrop.experiments.deploy.export import export_verified
from quick import CALL, QUICK
from torch import nn
from torch.nn import functional

ONCE = TrainSettings(epochs=0.2, batch_size=64, lr=0.001)


def trunk():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU())


class Siamese(nn.Module):
    """Which of two images is the brighter one."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head = trunk(), nn.Linear(8, 2)

    def forward(self, left, right):
        left, right = (self.trunk(each).mean((2, 3)) for each in (left, right))
        return self.head(left - right)


class Tasks(nn.Module):
    """The digit and whether it is odd, as a tuple."""

    def __init__(self):
        super().__init__()
        self.trunk, self.digit, self.odd = trunk(), nn.Linear(72, 10), nn.Linear(72, 2)

    def forward(self, images):
        maps = self.trunk(images).flatten(1)
        return self.digit(maps), self.odd(maps)


def pairs(images, seed):
    other = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    return (images, other), (images.mean((1, 2, 3)) > other.mean((1, 2, 3))).long()


def both(outputs, targets):
    """Cross-entropy of the digit and of odd or even."""
    return functional.cross_entropy(outputs[:, :10], targets[:, 0]) + functional.cross_entropy(
        outputs[:, 10:], targets[:, 1]
    )


def both_right(outputs, targets):
    """Fraction of an image's two tasks that are answered rightly."""
    answers = torch.stack([outputs[:, :10].argmax(1), outputs[:, 10:].argmax(1)], 1)
    return (answers == targets).float().mean(1)


def trained(model, inputs, loss, steps=60):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(*inputs)).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def images():
    data = digits()
    return [part.batch(torch.arange(900 if part is data.train else len(part))) for part in (data.train, data.test)]


@pytest.fixture(scope="module", autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.filterwarnings("ignore:Fine-tuning:keepdrop.errors.Notice")
def test_pairs_from_prune_to_files(images, tmp_path):
    (x, _), (x_test, _) = images
    train, test = pairs(x, 0), pairs(x_test, 1)
    model = trained(Siamese(), train[0], lambda outputs: functional.cross_entropy(outputs, train[1]))
    seen = []

    def loop(network):
        seen.append(network)
        trained(network, train[0], lambda outputs: functional.cross_entropy(outputs, train[1]), 2)

    call = CALL | {"layers": ["trunk.0"], "recover": ONCE}
    result = prune(model, train, test, **call | {"finetune": loop})
    assert result.macs < result.base_macs and result.base_accuracy > 0.7 and type(seen[0]) is Siamese
    assert type(result.model) is type(result.cut) is type(result.dense) is Siamese and len(result.example) == 2
    result.save(tmp_path)
    assert torch.equal(load_pruned(tmp_path, Siamese)(*result.example), result.model(*result.example))
    with pytest.raises(UserError, match="not fit the file"):
        load_pruned(tmp_path, Tasks)
    assert export_verified(result.model, result.example, tmp_path, "program").largest_difference < 1e-4
    assert {each.model for each in result.latency(batch_sizes=[2], repeats=1)} == {"base", "pruned"}
    assert torch.equal(model(*result.example), result.dense(*result.example))


@pytest.mark.filterwarnings("ignore:Fine-tuning:keepdrop.errors.Notice")
def test_tasks_together_and_each_alone(images, tmp_path):
    (x, y), (x_test, y_test) = images
    targets, targets_test = (torch.stack([each, each % 2], 1) for each in (y, y_test))
    model = trained(Tasks(), [x], lambda outputs: both(torch.cat(outputs, 1), targets))
    settings = replace(QUICK, metric=both_right, loss=both, output=[0, 1])
    call = CALL | {"layers": ["trunk.0"]}
    together = prune(model, (x, targets), (x_test, targets_test), **call | {"settings": settings, "finetune": ONCE})
    with pytest.warns(UserWarning, match="several outputs: metric and loss take '0', not 1"):
        first = prune(model, (x, y), (x_test, y_test), **call)
    settings = replace(QUICK, output=1)
    second = prune(model, (x, y % 2), (x_test, y_test % 2), **call | {"settings": settings, "finetune": ONCE})
    with torch.no_grad():
        answers = torch.stack([each.argmax(1) for each in model(x_test)], 1)
    right = (answers == targets_test).float().mean(0)
    for result, expected in ((together, right.mean()), (first, right[0]), (second, right[1])):
        assert result.base_accuracy == pytest.approx(float(expected), abs=0.05) and result.base_accuracy > 0.7
        assert [tuple(each.shape) for each in result.model(x_test)] == [(len(x_test), 10), (len(x_test), 2)]
    assert Settings().output is None
