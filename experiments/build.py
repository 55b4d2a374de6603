"""From configuration to objects: the only functions that read `_target_`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..envs.augment import Augment
from ..envs.checkpoint import load_checkpoint
from ..envs.data import from_datasets
from ..envs.images import LabelledData
from ..envs.modes import evaluating
from ..envs.observation import STATISTIC_NAMES
from ..envs.splits import Splits, split
from ..envs.task import LayerTask
from ..rewards.errors import UserError
from ..rewards.outcome import RewardFunction

Constructor = Callable[[], nn.Module]


def build(node: DictConfig, what: str) -> Any:
    """Instantiate a `_target_`; what goes wrong in there is a sentence about `what`."""
    if node is None or OmegaConf.is_missing(node, "_target_") or "_target_" not in node:
        raise UserError(
            f"{what}._target_ is not set; expected the import path of a function or class: {what}._target_=mine.name."
        )
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = _root_cause(error)
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(
            f"{what} could not be built from {node['_target_']}: {type(cause).__name__}: {cause}; check the path and "
            "its arguments."
        ) from error


def _root_cause(error: BaseException) -> BaseException:
    """What Hydra's error stands for: the sentence of a `UserError` if there is one, else the first cause of all."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def build_data(node: DictConfig) -> LabelledData:
    """The data source; a pair of datasets (train, test) of the user's is wrapped."""
    source = build(node, "data")
    if isinstance(source, LabelledData):
        return source
    if isinstance(source, tuple | list) and len(source) == 2:
        return from_datasets(*source)
    raise UserError(
        f"data._target_={node['_target_']} returned {type(source).__name__}; expected LabelledData or a pair of "
        "datasets (train, test)."
    )


def build_splits(config: DictConfig) -> Splits:
    """The three splits of a root configuration."""
    chosen = config.split
    return split(
        build_data(config.data), reward_from=chosen.reward_from, reward_size=chosen.reward_size, seed=chosen.seed
    )


def network_constructor(node: DictConfig, seed: int = 0) -> Constructor:
    """A function that builds the dense network anew, with the same initial weights each time."""

    def construct() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(node, "network")
        if not isinstance(model, nn.Module):
            raise UserError(
                f"network._target_={node['_target_']} returned {type(model).__name__}; expected a nn.Module."
            )
        return model

    return construct


def try_network(model: nn.Module, splits: Splits) -> None:
    """Run the network on two images, in evaluation mode; whatever goes wrong in it is a `UserError`."""
    images, _ = splits.fit.batch(torch.arange(min(2, len(splits.fit))))
    shape = tuple(images.shape)
    device = next((parameter.device for parameter in model.parameters()), None)
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(images.to(device))
    except Exception as error:
        raise UserError(
            f"The network fails on images of shape {shape} ({type(error).__name__}: {_first_line(error)}); give one "
            "that takes them: network=NAME, or its arguments."
        ) from error
    expected = (len(images), splits.fit.n_classes)
    got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if not isinstance(got, tuple) or len(got) != 2 or got[0] != expected[0] or got[1] < expected[1]:
        raise UserError(
            f"The network returns {got} for images of shape {shape}; expected logits of shape {expected}: one row "
            "an image, one column a class."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def load_network(construct: Constructor, checkpoint: str | None) -> nn.Module:
    """The dense network with a checkpoint's weights, in evaluation mode."""
    model = construct()
    if checkpoint is not None:
        load_checkpoint(model, Path(checkpoint))
    return model.eval()


def build_augment(node: DictConfig | None) -> Augment | None:
    """The augmentation of the fit images, or None."""
    return build(node, "augment") if node is not None else None


def build_reward(node: DictConfig) -> RewardFunction:
    """A pure function of an `Outcome`."""
    return build(node, "reward")


def build_policy(node: DictConfig, layer: LayerTask, seed: int) -> Any:
    """A fresh policy for one layer."""
    n_filters, n_weights = layer.observation.weights.shape
    return make_policy(node, n_filters, n_weights, seed)


def make_policy(node: DictConfig, n_filters: int, n_weights: int, seed: int = 0) -> Any:
    """A fresh policy: the configured factory gets whatever it asks for by name.

    Offered: n_filters, n_weights, n_statistics, statistic_names, seed.
    """
    factory = build(node, "policy")
    if not callable(factory):
        raise UserError(f"policy._target_={node['_target_']} made a {type(factory).__name__}; expected a factory.")
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


def resolve_device(name: str) -> torch.device:
    """ "cpu", "cuda", "cuda:1", "mps", or "auto" for the best one there is."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"device is {name!r}, which is not to be had here ({first}); use cpu or auto.") from error
    return device
