"""Copies of networks that `copy.deepcopy` refuses: the same answers, nothing shared that matters, or a name."""

import copy
import sys
import threading

import pytest
import torch
from keepdrop.envs.networks.copying import copied
from keepdrop.errors import UserError
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

IMAGES = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))


class Keeping(nn.Module):
    """Keeps activations of its last pass on itself, alone and in containers."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        self.features = F.relu(self.conv(x))
        self.history = {"means": [self.features.mean(), (self.features.std(), 1)]}
        return self.linear(self.features.mean((2, 3)))


class Tools(Keeping):
    """Python modules, locks, files and generators on self."""

    def __init__(self):
        super().__init__()
        self.functions, self.lock, self.generator = F, threading.Lock(), torch.Generator()
        self.log = sys.__stdout__


class Helper:
    """Knows the network, and has a lock."""

    def __init__(self, network):
        self.network, self.lock = network, threading.Lock()


class Helped(Keeping):
    def __init__(self):
        super().__init__()
        self.__dict__["helper"] = Helper(self)


class Refusing:
    """Belongs to one network, and says so."""

    def __init__(self, module):
        self.module = module

    def __deepcopy__(self, memo):
        raise TypeError("there is one of me")


def normed():
    model = Keeping()
    model.conv = weight_norm(model.conv)
    return model


def masked():
    model = Keeping()
    prune.l1_unstructured(model.conv, "weight", 0.5)
    return model


def buffered():
    model = Keeping()
    model.register_buffer("scale", torch.ones(1))
    model.scale = model.linear.weight.sum()
    return model


REFUSING = [
    Keeping,
    Tools,
    Helped,
    masked,
    buffered,
    pytest.param(normed, marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")),
]


@pytest.mark.parametrize("make", REFUSING)
def test_a_copy_answers_alike_and_is_its_own(make):
    model = make()
    answer = model(IMAGES)
    with pytest.raises((RuntimeError, TypeError)):
        copy.deepcopy(model)
    twin = copied(copied(model))
    assert torch.equal(twin(IMAGES), answer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert not torch.equal(twin(IMAGES), answer) and torch.equal(model(IMAGES), answer)
    twin(IMAGES).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_knows_the_network_knows_the_copy():
    model = Helped()
    model(IMAGES)
    twin = copied(model)
    assert twin.helper.network is twin and twin.helper.lock is model.helper.lock


def test_an_attribute_that_cannot_be_copied_is_named():
    model = Keeping()
    model.conv.__dict__["owner"] = Refusing(model.linear)
    with pytest.raises(UserError, match=r"attribute 'conv\.owner' \(Refusing\) holds parts .* there is one of me"):
        copied(model)


def test_ordinary_networks_are_deep_copied():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    twin = copied(model)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class Tied(nn.Module):
    """Layers, buffers and containers that are there twice, and a class with a copy of its own."""

    class Own(nn.ReLU):
        def __deepcopy__(self, memo):
            return type(self)(inplace=True)

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.own = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), self.Own()
        self.again, self.unnamed, self.sizes = self.norm, [self.conv, (1, 2)], {"a": [3, 4]}
        self.same_sizes = self.sizes
        self.register_buffer("mean", self.norm.running_mean[:2])
        self.conv.register_forward_hook(self.noted)
        self.calls = []

    def noted(self, _module, _inputs, _output):
        self.calls.append(1)

    def forward(self, x):
        return self.own(self.norm(self.conv(x)))


def test_copies_keep_what_belongs_together():
    model = Tied().eval()
    twin = copied(model)
    assert vars(twin).keys() == vars(copy.deepcopy(model)).keys()
    assert twin.again is twin.norm is not model.norm and twin.unnamed[0] is twin.conv
    assert twin.sizes == model.sizes and twin.same_sizes is twin.sizes is not model.sizes
    assert twin.sizes["a"] is not model.sizes["a"] and twin.own.inplace
    assert twin.mean.data_ptr() == twin.norm.running_mean.data_ptr() != model.mean.data_ptr()
    assert torch.equal(twin(IMAGES), model(IMAGES)) and (len(model.calls), len(twin.calls)) == (1, 1)
