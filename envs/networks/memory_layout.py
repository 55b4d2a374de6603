"""Memory layout: channels-last (NHWC) for networks that work with it, as convolutions are faster there, else NCHW.

A network that reshapes a map by `view`, or pools over channels, works in one layout only. Each one is tried once on one
or two images, and everything that puts images or weights in order asks here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .copying import copied
from .inputs import batch_size, is_batch, mapped, tensors_in, tensors_of
from .module_kinds import Inputs, run

CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
_known: WeakKeyDictionary[nn.Module, dict[Any, torch.memory_format]] = WeakKeyDictionary()


def layout_of(model: nn.Module, inputs: Inputs, *, training: bool = False) -> torch.memory_format:
    """The memory format that `model` takes its images in: `torch.channels_last`, or `torch.contiguous_format`.

    Channels-last wherever the network runs with images (and in evaluation mode weights) in that order and answers as it
    does otherwise, to rounding. Tried on copies, without a trace on the network or on random streams, and remembered.

    Args:
        model: the network.
        inputs: one image or more, where the network is, in any order: one tensor, a tuple of positional or a mapping of
            keyword arguments. Training needs two.
        training: whether it has to work in training mode, backward pass included, on a GPU with its weights in that
            order too (`weights_in_order`); answers are not compared there.
    """
    tensors = tensors_of(inputs)
    if all(value.dim() != 4 for value in tensors):
        return CONTIGUOUS
    known = _known.setdefault(model, {})
    key = (training, *((tuple(value.shape[1:]), value.device) for value in tensors))
    if key not in known:
        given = batch_size(inputs)
        some = mapped(inputs, lambda value: value[:2] if is_batch(value, given) else value)
        known[key] = _tried(model, some, training)
    return known[key]


def inherit_layout(model: nn.Module, source: nn.Module) -> None:
    """Take over for `model` what was tried on `source`, whose classes it shares: it reshapes and pools alike."""
    if source in _known:
        _known.setdefault(model, {}).update(_known[source])


def common_layout(models: Iterable[nn.Module], inputs: Inputs) -> torch.memory_format:
    """Channels-last where all these networks take it, in evaluation mode."""
    return CHANNELS_LAST if all(layout_of(model, inputs) == CHANNELS_LAST for model in models) else CONTIGUOUS


def arranged(inputs: Any, layout: torch.memory_format) -> Any:
    """The same values, every image tensor (4d) in that order in memory; what is in it already is not copied."""
    return mapped(inputs, lambda value: value.contiguous(memory_format=layout) if value.dim() == 4 else value)


def suited(model: nn.Module, inputs: Inputs) -> Any:
    """Inputs for a network as it is: as they come (arrays are channels-last), or rearranged if it takes NCHW alone."""
    return inputs if layout_of(model, inputs) == CHANNELS_LAST else arranged(inputs, CONTIGUOUS)


def is_channels_last(value: Tensor) -> bool:
    """Whether a 4d tensor lies in memory as channels_last."""
    return value.dim() == 4 and value.is_contiguous(memory_format=CHANNELS_LAST)


def order_weights(model: nn.Module, layout: torch.memory_format) -> None:
    """Put the weights of convolutions over images into channels-last order, in place, where images have it."""
    for module in nn.Module.modules(model) if layout == CHANNELS_LAST else ():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and "weight" in module._parameters:
            module.weight.data = module.weight.data.contiguous(memory_format=CHANNELS_LAST)


@contextmanager
def weights_in_order(model: nn.Module, layout: torch.memory_format) -> Iterator[None]:
    """`order_weights` inside; every weight lies as it did again afterwards, with the values that it has then."""
    found = [(each, each.stride()) for each in model.parameters()]
    order_weights(model, layout)
    try:
        yield
    finally:
        for parameter, stride in found:
            if parameter.stride() != stride:
                own = torch.empty_strided(parameter.shape, stride, dtype=parameter.dtype, device=parameter.device)
                parameter.data = own.copy_(parameter.data)


def _tried(model: nn.Module, inputs: Inputs, training: bool) -> torch.memory_format:
    devices = {value.device for value in tensors_of(inputs) if value.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)), torch.inference_mode(False), torch.set_grad_enabled(training):
        trial = _Trial(copied(model).train(training), training)
        plain = trial.answers(inputs, CONTIGUOUS)
        # A network that takes neither is explained by whoever runs it.
        if plain is None:
            return CONTIGUOUS if trial.answers(inputs, CHANNELS_LAST) is None else CHANNELS_LAST
        again = None if training else trial.answers(inputs, CONTIGUOUS)
        found = trial.answers(inputs, CHANNELS_LAST)
    if found is None:
        return CONTIGUOUS
    # One that answers by chance cannot be compared.
    comparable = again is not None and _same(plain, again)
    return CHANNELS_LAST if not comparable or _same(plain, found) else CONTIGUOUS


class _Trial:
    """A copy of a network, run in one layout and then the other."""

    def __init__(self, model: nn.Module, training: bool) -> None:
        self.model, self.training = model, training

    def answers(self, inputs: Inputs, layout: torch.memory_format) -> list[Tensor] | None:
        """All output tensors; None where the network fails."""
        if not self.training or _on_gpu(inputs):  # a training on a CPU leaves weights as they lie
            order_weights(self.model, layout)
        try:
            # `to` also gives single-channel images the strides of the layout, `contiguous` does not.
            images = mapped(inputs, lambda x: x.clone().to(memory_format=layout) if x.dim() == 4 else x.clone())
            found = tensors_in(run(self.model, images))
            if self.training:
                sums = [value.float().sum() for value in found if value.requires_grad]
                torch.stack(sums).sum().backward() if sums else None
        except Exception:
            return None
        return [value.detach() for value in found]


def _on_gpu(inputs: Inputs) -> bool:
    return any(value.device.type == "cuda" for value in tensors_of(inputs))


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(_close, first, second))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64) else 0.1
    largest = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance / 10 * largest, equal_nan=True)
