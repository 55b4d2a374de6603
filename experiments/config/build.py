"""From configuration to objects: the only functions that read `_target_`."""

from __future__ import annotations

import importlib.util
import inspect
import pydoc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ...envs.data.datasets import from_datasets
from ...envs.data.images import LabelledData
from ...envs.data.objective import TOP1, Objective
from ...envs.data.packing import Packing
from ...envs.data.splits import Splits, split
from ...envs.files.renamed import current_config, current_target
from ...envs.networks.answers import ready_network
from ...envs.networks.checkpoint import load_checkpoint
from ...envs.surgery.targets import RESOURCES, Target
from ...errors import UserError
from ...rewards.outcome import RewardFunction
from ..engines.engine import Engine
from ..engines.local_processes import LocalEngine
from ..pruning.layer_agents import PolicyFactory
from ..training.augment import Augment
from .entry_point import settings
from .schema import TargetConfig
from .stored import targets_in

Constructor = Callable[[], nn.Module]


def build(node: DictConfig, what: str) -> Any:
    """Instantiate a `_target_`; what goes wrong in there is a sentence about `what`."""
    if node is None or OmegaConf.is_missing(node, "_target_") or "_target_" not in node:
        raise UserError(
            f"{what}._target_ is not set; expected the import path of a function or class: {what}._target_=mine.name."
        )
    given = OmegaConf.to_container(node)
    if (current := current_config(given, top=False)) != given:
        node = DictConfig(current)
    for _, target in targets_in(current):
        find_users_code(target)
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


def build_target(node: DictConfig) -> Target | None:
    """What the pruned network may cost; None where nothing of it is given."""
    given = asdict(settings(node, TargetConfig))
    return None if all(given[name] is None for name in RESOURCES) else Target(**given)


def find_users_code(target: Any) -> None:
    """Let a `_target_` be imported from the working directory, where nothing that is installed has its name.

    The directory goes last on the path, and only then: a `torch.py` in a run folder must never be imported.
    """
    package, here = str(target).partition(".")[0], str(Path.cwd())
    if package.isidentifier() and importlib.util.find_spec(package) is None and here not in sys.path:
        sys.path.append(here)


def _root_cause(error: BaseException) -> BaseException:
    """What Hydra's error stands for: the sentence of a `UserError` if there is one, else the first cause of all."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def build_data(node: DictConfig) -> LabelledData:
    """The data source; a pair of datasets (train, test) of the user's is wrapped."""
    node, workers = _own_workers(node)
    source = build(node, "data")
    if isinstance(source, LabelledData):
        return source if workers is None else from_datasets(source.train, source.test, workers=workers)
    if isinstance(source, tuple | list) and len(source) == 2:
        return from_datasets(source[0], source[1], workers=workers)
    raise UserError(
        f"data._target_={node['_target_']} returned {type(source).__name__}; expected LabelledData or a pair (train, "
        "test) of datasets, DataLoaders or arrays (images, labels)."
    )


def _own_workers(node: DictConfig) -> tuple[DictConfig, int | None]:
    """`workers` of a data source whose function does not take it, and the rest: they then read what it returns."""
    if "workers" not in node or "_target_" not in node or OmegaConf.is_missing(node, "_target_"):
        return node, None
    find_users_code(node["_target_"])
    try:
        function: Any = pydoc.locate(current_target(node["_target_"]))
        if "workers" in inspect.signature(function).parameters:
            return node, None
    except (pydoc.ErrorDuringImport, TypeError, ValueError):
        pass  # `build` explains what is wrong
    return OmegaConf.masked_copy(node, [str(key) for key in node if key != "workers"]), node["workers"]


def build_splits(config: DictConfig) -> Splits:
    """The three splits of a root configuration, with its metric and loss."""
    chosen, objective = config.split, build_objective(config)
    return split(
        build_data(config.data),
        reward_from=chosen.reward_from,
        reward_size=chosen.reward_size,
        seed=chosen.seed,
        objective=objective,
    )


def build_objective(config: DictConfig) -> Objective:
    """The metric and the loss of a root configuration; a run of an earlier version has neither."""
    metric, loss = (
        None if config.get(what) is None else build_function(config[what], what) for what in ("metric", "loss")
    )
    return Objective(metric or TOP1.metric, loss)


def build_function(node: DictConfig, what: str) -> Callable[..., Any]:
    """A function of outputs and targets: the one `_target_` names, other keys as arguments, or an object of a class.

    A function there that makes such functions needs `_partial_: false`.
    """
    if not OmegaConf.is_missing(node, "_target_") and "_partial_" not in node and _is_function(node["_target_"]):
        node = DictConfig({**node, "_partial_": True})
    made = build(node, what)
    if not callable(made):
        raise UserError(
            f"{what}._target_={node['_target_']} made a {type(made).__name__}; expected a function of outputs and "
            "targets."
        )
    return made


def _is_function(path: str) -> bool:
    """Whether an import path names a callable that is no class; what fails here is explained by `build`."""
    find_users_code(path)
    try:
        found = pydoc.locate(current_target(path))  # Hydra's own would log what fails
    except pydoc.ErrorDuringImport:
        return False
    return callable(found) and not isinstance(found, type)


def made_of(node: DictConfig) -> dict[str, Any]:
    """What makes the network: the import path and its arguments, without the setting that says which output counts."""
    given = OmegaConf.to_container(node)
    assert isinstance(given, dict)
    return {str(key): value for key, value in given.items() if key != "output"}


@dataclass
class NetworkConstructor:
    """Builds the dense network anew, plain and adapted (`ready_network`), with the same initial weights each time.

    Args:
        node: `network` of a root configuration; its `output` says which output counts, all else makes the network.
        seed: of the initial weights.
        images: an item or more as the data gives them.
        packing: of several inputs.

    `notes` says what was changed in what the user's function returned, once it was called.
    """

    node: DictConfig
    seed: int = 0
    images: torch.Tensor | None = None
    packing: Packing | None = None
    notes: tuple[str, ...] = ()

    def __call__(self) -> nn.Module:
        """Raises UserError where it cannot be built."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = build(DictConfig(made_of(self.node)), "network")
            if not isinstance(model, nn.Module):
                raise UserError(
                    f"network._target_={self.node['_target_']} returned {type(model).__name__}; expected a nn.Module."
                )
            output: Any = OmegaConf.select(self.node, "output")
            output = OmegaConf.to_container(output) if isinstance(output, ListConfig) else output
            plain, self.notes = ready_network(model, self.images, output, self.packing)
        return plain


def load_network(construct: Constructor, checkpoint: str | None) -> nn.Module:
    """The dense network with a checkpoint's weights, in evaluation mode."""
    model = construct()
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def build_augment(node: DictConfig | None) -> Augment | None:
    """The augmentation of the fit images, or None."""
    return build(node, "augment") if node is not None else None


def build_reward(node: DictConfig) -> RewardFunction:
    """A pure function of an `Outcome`."""
    return build(node, "reward")


def build_engine(config: DictConfig) -> Engine:
    """Where independent work runs; `workers` of the command says how many processes, unless the engine does."""
    made: Engine = build(config.engine, "engine")
    return LocalEngine(config.get("workers")) if made == LocalEngine() else made


def build_policy_factory(node: DictConfig) -> PolicyFactory:
    """What makes a layer's policy (`call_policy_factory`)."""
    factory = build(node, "policy")
    if not callable(factory):
        raise UserError(f"policy._target_={node['_target_']} made a {type(factory).__name__}; expected a factory.")
    return factory
