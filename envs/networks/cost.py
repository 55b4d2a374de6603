"""Cost of a network: multiply-accumulates (MACs) and parameters by module."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .hooks import hooked
from .inputs import as_call, batch_size
from .memory_layout import CONTIGUOUS, arranged
from .modes import evaluating
from .module_kinds import Inputs, n_products

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class ModuleCost:
    """One module: its class, MACs per image over all its calls, own parameters, and calls in one forward pass."""

    kind: str
    macs: int
    params: int
    n_calls: int


@dataclass(frozen=True)
class Cost:
    """A network: MACs per image, parameters, and every module that has either, by qualified name."""

    macs: int
    params: int
    modules: Mapping[str, ModuleCost]


def count_cost(model: nn.Module, example_inputs: Inputs) -> Cost:
    """MACs per image (batch 1) and parameters of `model`, from one forward pass on `example_inputs`.

    Counted are convolutions (1d to 3d, grouped, transposed), linear layers and recurrent ones (each weight once a step,
    without the products of their gates); a bias, normalisation, activations and products outside such modules are not.
    A module called twice counts twice, its parameters once. `example_inputs` is a tensor, a tuple of positional or a
    mapping of keyword arguments; the first tensor's first axis is the batch.
    The model is left as it was: weights, train/eval modes, hooks.
    """
    args, kwargs = as_call(arranged(example_inputs, CONTIGUOUS))
    calls: dict[nn.Module, list[int]] = defaultdict(list)

    def counting(name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        if isinstance(module, (*CONVS, *TRANSPOSED, nn.Linear, *RECURRENT)):
            yield module.register_forward_hook(_recorder(calls))

    with hooked(model, counting), evaluating(model), torch.no_grad():
        model(*args, **kwargs)
    modules = _by_name(model, calls, n_images=batch_size(example_inputs))
    params = sum(parameter.numel() for parameter in model.parameters())
    return Cost(sum(module.macs for module in modules.values()), params, modules)


def _recorder(calls: dict[nn.Module, list[int]]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, RECURRENT):
            states = output if isinstance(output, Tensor) else output[0]
            values = states.data  # also of a packed sequence
            calls[module].append(values.numel() // values.shape[-1] * n_products(module))
            return
        # Each output element costs one product per weight of its filter; a transposed convolution spreads each input
        # element over the filter instead.
        elements = inputs[0].numel() if isinstance(module, TRANSPOSED) and inputs else output.numel()
        calls[module].append(elements * _products_per_element(module))

    return record


def _products_per_element(module: Any) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features
    width = module.out_channels if isinstance(module, TRANSPOSED) else module.in_channels
    return width // module.groups * math.prod(module.kernel_size)


def _by_name(model: nn.Module, calls: Mapping[nn.Module, list[int]], n_images: int) -> dict[str, ModuleCost]:
    modules = {}
    counted: set[nn.Parameter] = set()  # one that several modules share counts at the first
    for name, module in model.named_modules():
        own = set(module.parameters(recurse=False)) - counted
        counted |= own
        params = sum(parameter.numel() for parameter in own)
        macs = calls.get(module, [])
        if params or macs:
            modules[name] = ModuleCost(type(module).__name__, sum(macs) // n_images, params, len(macs))
    return modules
