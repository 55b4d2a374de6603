"""Checks that need no configuration: whether the network takes the images and can be trained, which device there is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ...envs.data.objective import output_of
from ...envs.data.packing import packing_of
from ...envs.data.splits import Splits
from ...envs.networks.copying import copied
from ...envs.networks.memory_layout import suited
from ...envs.networks.modes import evaluating
from ...envs.surgery.cutting import prune
from ...envs.surgery.filter_group import FilterGroup
from ...errors import Notice, UserError, first_line, summarised
from ..training.devices import check_devices
from ..training.loop import DivergedError, fit_network
from ..training.train_settings import TrainSettings


def try_network(model: nn.Module, splits: Splits) -> None:
    """Run the network on two images, in evaluation mode; whatever goes wrong in it or its measure is a `UserError`."""
    images, targets = splits.fit.batch(torch.arange(min(2, len(splits.fit))))
    packing = packing_of(splits.fit)
    shape = tuple(images.shape) if packing is None else f"{packing} each"
    device = next((parameter.device for parameter in model.parameters()), None)
    try:
        with torch.no_grad(), evaluating(model):
            outputs = model(suited(model, images.to(device)))
    except Exception as error:
        raise UserError(
            f"The network fails on images of shape {shape} ({type(error).__name__}: {first_line(error)});",
            python="give images as the network takes them, or another network.",
            typed="give one that takes them: network=NAME, or its arguments.",
        ) from error
    if splits.objective.answers_yes_or_no(outputs, targets):
        _refuse_probabilities(model, splits)
    if not splits.objective.is_top1:
        splits.objective.try_out(outputs, targets.to(device))
        return
    expected = (len(images), splits.fit.n_classes)
    logits = outputs.get("out") if isinstance(outputs, Mapping) else outputs
    got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(outputs).__name__
    if splits.fit.n_classes <= 2 and isinstance(logits, torch.Tensor) and logits.numel() == len(images):
        return  # one logit for two classes
    if not isinstance(got, tuple) or len(got) != 2 or got[0] != expected[0] or got[1] < expected[1]:
        raise UserError(
            f"The network returns {got} for images of shape {shape}; expected logits of shape {expected}: one row "
            "per image, one column per class."
        )


@torch.no_grad()
def _refuse_probabilities(model: nn.Module, splits: Splits) -> None:
    """Refuse a network that ends in a sigmoid where logits are expected: everything would be a yes.

    A network that is not trained yet may answer from 0 to 1 by chance; with larger weights it does so no longer.
    """
    if getattr(splits.objective.metric, "probabilities", False):
        return
    images, _ = splits.fit.batch(torch.arange(min(64, len(splits.fit))))
    low, high = _answers_between(model, images)
    if not 0 <= low <= high <= 1:
        return
    larger = copied(model)
    for parameter in larger.parameters():
        parameter.mul_(10)
    if high > 0 and _answers_between(larger, images[:8])[1] > 1:
        return
    raise UserError(
        f"The network returns one number from {low:.3g} to {high:.3g} for each target, which are probabilities, "
        "not logits; say so with",
        python="Settings(metric=keepdrop.BinaryAccuracy(probabilities=True)), or keepdrop.Dice for masks.",
        typed="metric=binary metric.probabilities=true, or metric=dice for masks.",
    )


def _answers_between(model: nn.Module, images: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest number that the network returns, in evaluation mode."""
    device = next((parameter.device for parameter in model.parameters()), None)
    with evaluating(model):
        found = output_of(model(suited(model, images.to(device))))
    return float(found.min()), float(found.max())


def try_training(
    model: nn.Module, splits: Splits, settings: Iterable[TrainSettings], groups: Sequence[FilterGroup] = ()
) -> None:
    """Train copies for one step, of the network as it is and one filter smaller in each group; UserError if one fails.

    Only where one of the trainings that are to follow is longer than 0 epochs; hours of search come before them.
    """
    settings = list(settings)
    check_devices(settings, next(iter(model.parameters())).device)
    chosen = next((each for each in settings if each.epochs > 0), None)
    if chosen is None:
        return
    _try_step(model, splits, chosen, "")
    smaller = {group: torch.arange(group.n_filters) > 0 for group in groups if group.n_filters > 1}
    if smaller:
        _try_step(prune(model, smaller), splits, chosen, ", cut by one filter per layer,")


def _try_step(model: nn.Module, splits: Splits, chosen: TrainSettings, which: str) -> None:
    """One step on two images, which changes nothing but the copy."""
    pair = splits.fit.select(torch.arange(2)) if len(splits.fit) > 1 else splits.fit
    step = replace(chosen, epochs=1, batch_size=2, lr=0.0, distill_weight=0.0, bf16=False, devices=1)
    try:
        fit_network(copied(model), pair, step, seed=0)
        return
    except DivergedError:
        problem = "the loss is not a number"
    except UserError:
        raise
    except Exception as error:
        problem = summarised(error)
    raise UserError(
        f"The network{which} answers in evaluation mode and cannot be trained ({problem}); prune without training:",
        python="finetune=None and recover=None, or give a training loop of your own: finetune=FUNCTION.",
        typed="finetune.epochs=0 recovery.train.epochs=0, or from Python with a training loop of your own.",
    )


def check_fineness(drop_bound: float, n_images: int) -> None:
    """Say, as a `Notice`, that a drop bound is finer than one reward image."""
    if 0 < drop_bound * n_images < 1 - 1e-9:
        warnings.warn(
            f"drop_bound is {drop_bound:g}, and one of the {n_images} reward images is {1 / n_images:.2g}: no image "
            "may be lost; expected a wider bound, or more reward images.",
            Notice,
            stacklevel=3,
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
