"""Zoo file: a YAML list of trained networks with their data, which an agent is trained over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError  # type: ignore[import-untyped]

from ...envs.data.splits import Source, Splits, split
from ...errors import UserError, summarised
from ..config.build import NetworkConstructor, build_data, load_network
from ..config.schema import SplitConfig
from ..config.stored import is_offered, targets_in

KEYS = {"name", "family", "network", "checkpoint", "data"}
NEEDED = KEYS - {"checkpoint"}


@dataclass(frozen=True)
class ZooNetwork:
    """One trained network of a zoo.

    Attributes:
        name: of it alone; files of the run are called so.
        family: what `leave_out` leaves out together.
        network: `_target_` and arguments of what builds it.
        checkpoint: its weights; None where the function brings them.
        data: `_target_` and arguments of its images.
    """

    name: str
    family: str
    network: Mapping[str, Any]
    checkpoint: str | None
    data: Mapping[str, Any]

    def load(self) -> nn.Module:
        """The network with its weights, in evaluation mode; UserError where it cannot be built."""
        return load_network(NetworkConstructor(DictConfig(dict(self.network))), self.checkpoint)

    def splits(self, chosen: SplitConfig, fit_images: int) -> Splits:
        """Its images, of which the first `fit_images` are fitted on."""
        made = split(
            build_data(DictConfig(dict(self.data))),
            reward_from=cast(Source, chosen.reward_from),
            reward_size=chosen.reward_size,
            seed=chosen.seed,
        )
        return replace(made, fit=made.fit.select(torch.arange(min(fit_images, len(made.fit)))))


def read_zoo(file: str, modules: Sequence[str]) -> list[ZooNetwork]:
    """The networks that a zoo file names; UserError for one that cannot be read or names code that was not allowed.

    Args:
        file: YAML; `checkpoint` and `data.path` are relative to the folder it lies in.
        modules: those whose code it may call beside keepdrop's own; they are typed, never taken from the file.
    """
    path = Path(file)
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise UserError(f"There is no zoo file {file!r}; expected a YAML list of networks.") from None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"The zoo file {file!r} cannot be read ({summarised(error)}); expected a YAML list.") from error
    if not isinstance(content, list) or not content:
        raise UserError(f"The zoo file {file!r} holds no list; expected one network per entry, each with a name.")
    networks = [_network(entry, position, path) for position, entry in enumerate(content)]
    names = [each.name for each in networks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"The zoo file {file!r} has two networks called {repeated[0]!r}; expected each name once.")
    for network in networks:
        _check_code(network, modules, file)
    return networks


def _network(entry: Any, position: int, path: Path) -> ZooNetwork:
    where = f"Network {position + 1} of the zoo file {str(path)!r}"
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {type(entry).__name__}; expected {', '.join(sorted(KEYS))}.")
    if odd := sorted(str(key) for key in entry.keys() - KEYS):
        raise UserError(f"{where} has {odd[0]!r}; expected {', '.join(sorted(KEYS))}.")
    if missing := sorted(NEEDED - entry.keys()):
        raise UserError(f"{where} has no {missing[0]!r}; expected {', '.join(sorted(NEEDED))}.")
    name, checkpoint = str(entry["name"]), entry.get("checkpoint")
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise UserError(f"{where} is called {name!r}; expected letters, digits, '-', '_' and '.', as in a file's name.")
    for what in ("network", "data"):
        if not isinstance(entry[what], dict) or not isinstance(entry[what].get("_target_"), str):
            raise UserError(f"{where}, {name!r}, has a {what} without _target_; expected an import path and arguments.")
    if checkpoint is not None:
        checkpoint = str(path.parent / str(checkpoint))
        if not Path(checkpoint).is_file():
            raise UserError(f"{where}, {name!r}, has the checkpoint {checkpoint!r}, which does not exist.")
    data = dict(entry["data"])
    if "path" in data:
        data["path"] = str(path.parent / str(data["path"]))
    return ZooNetwork(name, str(entry["family"]), entry["network"], checkpoint, data)


def _check_code(network: ZooNetwork, modules: Sequence[str], file: str) -> None:
    for _, target in targets_in([network.network, network.data]):
        package = str(target).rpartition(".")[0]
        if not is_offered(target) and package not in modules:
            raise UserError(
                f"The zoo file {file!r} calls {target!r}, which is not keepdrop's; if it may run, add "
                f"modules=[{package}] to the command."
            )
