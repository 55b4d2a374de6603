"""`keepdrop COMMAND --help`: the text that the command's configuration holds, and the groups it offers.

Hydra's own help says the same, but composes every group for it and needs torch: seconds instead of tenths.
"""

from __future__ import annotations

import textwrap
from importlib import resources

from omegaconf import DictConfig, OmegaConf

from ..config.cli_errors import CONF, command_of, groups

_GROUPS = "$APP_CONFIG_GROUPS"
WIDTH = 120
FLAGS = ("--help", "-h")
INHERITED = "inherited"  # as in config/schema.py, which needs torch
OF_TRAINING = ("engine", "experiment", "policy", "recipe", "reward")  # groups that say how an agent is trained


def command_help(root: str) -> str:
    """Help of the command whose root configuration is `root`."""
    config = OmegaConf.merge(_read("common.yaml"), _read(f"{root}.yaml"))
    lines = [_wrapped(f"{name}: {', '.join(options)}") for name, options in offered(root).items()]
    return str(config.hydra.help.template).replace(_GROUPS, "".join(lines)).rstrip()


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False) + "\n"


def offered(root: str) -> dict[str, list[str]]:
    """Groups that a command chooses from, with their options; of the experiments those that start it.

    `keepdrop apply` inherits them from the run of agents that are trained.
    """
    listed = _read(f"{root}.yaml").defaults
    defaults = [next(iter(each)) for each in listed if isinstance(each, DictConfig)]
    known = groups()
    named = [name for name in known if (name not in OF_TRAINING if INHERITED in listed else name in defaults)]
    command = root.replace("_", "-")
    return {
        name: [each for each in known[name] if name != "experiment" or command_of(each) == command] for name in named
    }


def _read(name: str) -> DictConfig:
    config = OmegaConf.create((resources.files(CONF) / name).read_text(encoding="utf-8"))
    assert isinstance(config, DictConfig)
    return config
