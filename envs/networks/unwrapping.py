"""The plain network inside what people bring: DataParallel, torch.compile, EMA, masks, spectral norm, lazy modules."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim.swa_utils import AveragedModel

from ...errors import UserError, first_line
from ..data.randomness import randomness_restored
from .copying import copied
from .inputs import beside, resized
from .modes import evaluating, modes_restored
from .module_kinds import Inputs, run
from .weights_in_parts import fold_norms, make_masks_permanent

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
_HOLDERS = ("module", "ema", "ema_model", "model")


def plain_network(
    model: Any, example_inputs: Inputs | None = None, normalised: Collection[str] = ()
) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of the network that `model` is, or holds, in the form that is pruned; `model` stays as it is.

    Taken off, at the top and inside: DataParallel, DistributedDataParallel, `torch.compile`, AveragedModel, and holders
    without a forward of their own (EMA copies). A wrapper that computes something itself is a part of the network, and
    stays. Masks of `torch.nn.utils.prune` are made permanent, so are the weights that torch's weight norm and spectral
    norm make; half and double precision become float32, and lazy modules get their sizes from one forward pass.

    Args:
        model: a network, or an object that holds one as its module, ema, ema_model or model.
        example_inputs: what the network runs on; only needed for lazy modules.
        normalised: modules whose weight norm stays, as files of earlier versions have it.

    Returns the copy, on the device it came from and in its mode, and a sentence on everything that was changed.
    Raises UserError for what is no network, cannot be copied or, being lazy, does not run on the example.
    """
    inner, taken = _unwrapped(_module_in(model))
    _refuse_quantised(inner)
    network = copied(inner)
    taken += _unwrap_inside(network)
    notes = []
    if taken:
        kinds = ", ".join(dict.fromkeys(taken))
        notes.append(f"The network came wrapped ({kinds}); it is pruned and given back plain, without the wrapper.")
    if masked := make_masks_permanent(network):
        notes.append(
            f"Masks of torch.nn.utils.prune on {_some(masked)} were made permanent: what they hide is zero, and "
            "training may change it."
        )
    if folded := fold_norms(network, normalised):
        notes.append(
            f"Weight or spectral norm of {_some(folded)} was made permanent: the weights are what it made them, and "
            "training no longer normalises them."
        )
    kinds_of_number = {each.dtype for each in network.parameters() if each.is_floating_point()}
    if len(kinds_of_number) == 1 and torch.float32 not in kinds_of_number:
        nn.Module.float(network)
        name = str(kinds_of_number.pop()).removeprefix("torch.")
        notes.append(f"The network came in {name}; it is pruned and given back in float32.")
    if is_lazy(network):
        _materialise(network, example_inputs)
        notes.append("Lazy modules got their sizes from one image.")
    return network, tuple(notes)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


def is_wrapped(model: Any) -> bool:
    """Whether the network, or a part of it, is inside something that `plain_network` takes off."""
    if not isinstance(model, nn.Module) or _inside(model) is not None:
        return True
    parts = (child for module in nn.Module.modules(model) for child in module.children())
    return any(_has_forward(child) and _inside(child) is not None for child in parts)


def is_lazy(model: nn.Module) -> bool:
    """Whether some sizes are unknown until the first forward pass."""
    return any(_is_lazy_itself(module) for module in nn.Module.modules(model))


def _is_lazy_itself(module: nn.Module) -> bool:
    """Whether this module, without its parts, has sizes that are unknown until the first forward pass."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(isinstance(each, (UninitializedParameter, UninitializedBuffer)) for each in tensors)


def _module_in(model: Any) -> nn.Module:
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            "model is a TorchScript module, whose layers cannot be cut; give the network that it was made of, with "
            "its weights (load_state_dict(script.state_dict()))."
        )
    if isinstance(model, nn.Module):
        return model
    held = next((found for name in _HOLDERS if isinstance(found := getattr(model, name, None), nn.Module)), None)
    if held is None:
        raise UserError(f"model is a {type(model).__name__}; expected a network, a torch.nn.Module.")
    return held


def _refuse_quantised(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if any(part in type(module).__module__ for part in (".nn.quantized", ".nn.intrinsic.quantized")):
            raise UserError(
                f"Layer '{name}' is quantised, and integers cannot be pruned; prune the network as it was before it "
                "was quantised, and quantise the smaller one."
            )


def _inside(module: nn.Module) -> tuple[nn.Module, str] | None:
    """What a wrapper holds, and what the wrapper is called; None for everything else."""
    if "_orig_mod" in module._modules:
        return module.get_submodule("_orig_mod"), "torch.compile"
    if isinstance(module, _WRAPPERS):
        return module.get_submodule("module"), type(module).__name__
    if not _has_forward(module):
        held = next((found for name in _HOLDERS if (found := module._modules.get(name)) is not None), None)
        return None if held is None else (held, type(module).__name__)
    return None


def _unwrapped(module: nn.Module) -> tuple[nn.Module, list[str]]:
    taken = []
    while (found := _inside(module)) is not None:
        module, kind = found
        taken.append(kind)
    return module, taken


def _unwrap_inside(network: nn.Module) -> list[str]:
    """Take wrappers off parts of the network, in place; returns their kinds."""
    taken: list[str] = []
    for parent in list(nn.Module.modules(network)):
        for name, child in list(parent.named_children()):
            # A part without a forward is a container, as a ModuleList is, and no wrapper.
            if _has_forward(child):
                inner, kinds = _unwrapped(child)
                setattr(parent, name, inner)
                taken += kinds
    return taken


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in vars(module) or "_orig_mod" in module._modules


def _materialise(network: nn.Module, example_inputs: Inputs | None) -> None:
    if example_inputs is None:
        raise UserError(
            f"{type(network).__name__} has lazy modules, whose sizes nobody knows yet; run it on one image first."
        )
    inputs = beside(network, example_inputs)
    try:
        with torch.no_grad(), evaluating(network):
            run(network, inputs)
        if is_lazy(network):
            _materialise_heads(network, inputs)
    except Exception as error:
        raise UserError(
            f"{type(network).__name__} has lazy modules and fails on one image ({type(error).__name__}: "
            f"{first_line(error)}); give images that it takes."
        ) from error
    if is_lazy(network):
        lazy = next(name for name, module in network.named_modules() if _is_lazy_itself(module))
        raise UserError(
            f"The lazy module '{lazy}' of {type(network).__name__} runs neither in evaluation nor in training mode, so "
            "its sizes cannot be known; expected one that runs: leave it out."
        )


def _materialise_heads(network: nn.Module, inputs: Inputs) -> None:
    """Sizes of what runs in training mode alone (auxiliary heads), from a pass that leaves statistics as they were."""
    lazy = [module for module in nn.Module.modules(network) if _is_lazy_itself(module)]
    known = {name: value.clone() for name, value in network.named_buffers() if type(value) is not UninitializedBuffer}
    with torch.no_grad(), modes_restored(network), randomness_restored():
        run(network.train(), resized(inputs, 2))
    buffers = dict(network.named_buffers())
    for name, value in known.items():
        buffers[name].data.copy_(value)
    for module in lazy:
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
