"""Checks and choices that need no configuration: does the network take the images, which device, which policy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...envs.data.splits import Splits
from ...envs.networks.modes import evaluating
from ...envs.observation import STATISTIC_NAMES
from ...errors import UserError, first_line

PolicyFactory = Callable[..., Any]


def call_policy_factory(factory: PolicyFactory, n_filters: int, n_weights: int, seed: int = 0) -> Any:
    """A fresh policy: `factory` gets whatever it asks for by name.

    Offered: n_filters, n_weights, n_statistics, statistic_names, seed.
    """
    offered = {
        "n_filters": n_filters,
        "n_weights": n_weights,
        "n_statistics": len(STATISTIC_NAMES),
        "statistic_names": STATISTIC_NAMES,
        "seed": seed,
    }
    try:
        wanted = inspect.signature(factory).parameters
        return factory(**{name: value for name, value in offered.items() if name in wanted})
    except (ValueError, TypeError) as error:
        raise UserError(f"policy could not be built: {error}") from error


def try_network(model: nn.Module, splits: Splits) -> None:
    """Run the network on two images, in evaluation mode; whatever goes wrong in it or its measure is a `UserError`."""
    images, targets = splits.fit.batch(torch.arange(min(2, len(splits.fit))))
    shape = tuple(images.shape)
    device = next((parameter.device for parameter in model.parameters()), None)
    try:
        with torch.no_grad(), evaluating(model):
            outputs = model(images.to(device))
    except Exception as error:
        raise UserError(
            f"The network fails on images of shape {shape} ({type(error).__name__}: {first_line(error)}); give one "
            "that takes them: network=NAME, or its arguments."
        ) from error
    if not splits.objective.is_top1:
        splits.objective.try_out(outputs, targets.to(device))
        return
    expected = (len(images), splits.fit.n_classes)
    logits = outputs.get("out") if isinstance(outputs, Mapping) else outputs
    got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(outputs).__name__
    if not isinstance(got, tuple) or len(got) != 2 or got[0] != expected[0] or got[1] < expected[1]:
        raise UserError(
            f"The network returns {got} for images of shape {shape}; expected logits of shape {expected}: one row "
            "an image, one column a class."
        )


def resolve_device(name: str) -> torch.device:
    """ "cpu", "cuda", "cuda:1", "mps", or "auto" for the best one there is.

    float32 is float32 on an NVIDIA GPU, too, from here on: with TF32, torch's default for convolutions there, a masked
    and a cut network differ by more than rounding.
    """
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}; expected cpu, cuda, cuda:1, mps or auto.") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"device is {name!r}, which is not to be had here ({first}); use cpu or auto.") from error
    return device
