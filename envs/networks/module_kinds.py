"""Kinds of modules: those whose channel behaviour is known are taken whole instead of being looked into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LEAVES = (*_CONVS, nn.Linear, _BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.PReLU)
_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def is_leaf(module: nn.Module) -> bool:
    """Whether `module` computes exactly what torch's own class does, with plain parameters.

    A subclass with its own `forward`, a parametrised weight or a weight made by a hook (weight norm) does something to
    its weight that slicing might not commute with: it is not a leaf.
    """
    base = next((base for base in _LEAVES if isinstance(module, base)), None)
    if base is None or parametrize.is_parametrized(module):
        return False
    if type(module).forward is not base.forward:
        return False
    if isinstance(module, _ConvNd) and getattr(type(module), "_conv_forward", None) is not getattr(
        base, "_conv_forward", None
    ):
        return False
    return "weight" in module._parameters


def is_plain_conv2d(module: object) -> TypeGuard[nn.Conv2d]:
    """A 2d convolution as torch's own, padded with zeros by numbers."""
    if not isinstance(module, nn.Conv2d) or not is_leaf(module):
        return False
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def is_extended(module: nn.Module) -> bool:
    """Whether `module` is a layer that does more than torch's operator.

    Its class has a `forward` of its own, or, of a convolution, something makes its weight (weight norm).
    """
    if isinstance(module, _ConvNd):
        return not is_leaf(module)
    known = isinstance(module, (nn.Linear, _BatchNorm, nn.GroupNorm))
    plain = not parametrize.is_parametrized(module) and "weight" in module._parameters
    return known and plain and not is_leaf(module)


def is_recurrent(module: nn.Module) -> bool:
    """An LSTM, GRU or RNN (or the cell of one) that computes exactly what torch's own does, with plain parameters."""
    base = next((base for base in _RECURRENT if isinstance(module, base)), None)
    if base is None or parametrize.is_parametrized(module) or type(module).forward is not base.forward:
        return False
    return all(name in module._parameters for name in reading_weights(module))


def is_attention(module: nn.Module) -> bool:
    """torch's multi-head attention, which is taken whole: it has a way of its own in evaluation mode."""
    return isinstance(module, nn.MultiheadAttention)


def reading_weights(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that multiply what a layer reads; several in a recurrent layer of two directions."""
    if isinstance(module, nn.RNNBase):
        return ("weight_ih_l0", "weight_ih_l0_reverse") if module.bidirectional else ("weight_ih_l0",)
    return ("weight_ih",) if isinstance(module, nn.RNNCellBase) else ("weight",)


def is_conv(module: nn.Module) -> bool:
    """A convolution or transposed convolution of 1, 2 or 3 dimensions."""
    return isinstance(module, _ConvNd)


def is_transposed(module: nn.Module) -> bool:
    """A transposed convolution, whose weight is (in, out / groups, ...)."""
    return isinstance(module, _ConvTransposeNd)


def is_depthwise(module: nn.Module) -> bool:
    """A convolution in which every input channel has its own filters and sees no other channel."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels and module.groups > 1


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Call `model` on a tensor, a tuple of positional arguments or a mapping of keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs)


def n_products(module: nn.Module) -> int:
    """Weights that a recurrent layer multiplies with in each step; biases are none."""
    return sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() > 1)


class LeafTracer(fx.Tracer):
    """Traces a network down to torch's modules and to user subclasses that behave exactly like them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Known modules, every layer that may read a group's filters, and whatever `torch.fx` takes as a leaf."""
        if getattr(type(m), "traced_whole", False) is True:  # of ours, `surgery.whole_blocks.Vanished`
            return True
        return is_leaf(m) or isinstance(m, (*_CONVS, nn.Linear)) or super().is_leaf_module(m, module_qualified_name)
