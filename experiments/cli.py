"""`keepdrop COMMAND ...`: finds the command, runs it, and turns a user's mistake into one sentence."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ..agent.saved_agent import AgentMismatch
from ..rewards.errors import UserError
from .mistakes import DISK_ERRORS, explain, nearest

COMMANDS = {
    "prune": "shrink a trained CNN: train an agent per layer, remove filters, fine-tune, report",
    "inspect": "show what can be pruned, what hangs on it, and what is skipped and why",
    "train-cnn": "train a base network",
    "train-agent": "train the agent of one layer (-m layer=a,b,c trains several)",
    "apply": "let trained agents decide on a new checkpoint, without training them",
}
MODULES = {"inspect": "inspection"}  # where a command's module is not called like the command
USER_MISTAKE = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Console entry point; exits with 0, with 2 after a user's mistake, with 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        sys.exit(run(arguments))
    except BrokenPipeError:  # `keepdrop prune --help | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (UserError, AgentMismatch, HydraException, OmegaConfBaseException, OSError) as error:
        if debug or (isinstance(error, OSError) and not _is_mistake(error)):
            raise
        print(f"keepdrop: {_sentence(error, arguments)}", file=sys.stderr)
        sys.exit(USER_MISTAKE)
    except KeyboardInterrupt as stop:
        print(f"\nkeepdrop: stopped. {stop}".rstrip(), file=sys.stderr)
        sys.exit(130)


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"keepdrop {version('keepdrop')}")
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        hint = nearest(command, COMMANDS) or f"expected one of {', '.join(COMMANDS)}."
        raise UserError(f"{command!r} is not a command; {hint}")
    module = importlib.import_module(f".{MODULES.get(command, command.replace('-', '_'))}", __package__)
    _enter(arguments)
    module.door()
    return 0


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: keepdrop COMMAND [key=value ...]",
            "",
            *lines,
            "",
            "keepdrop COMMAND --help  shows a command's options; --debug shows the traceback of an error.",
        ]
    )


def _enter(arguments: list[str]) -> None:
    """What Hydra and a user's `_target_` need: an argument list, full errors, and the working directory on the path."""
    sys.argv = [f"keepdrop {arguments[0]}", *arguments[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed by Hydra
    os.environ.setdefault("KEEPDROP_COMMAND", arguments[0])
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _is_mistake(error: OSError) -> bool:
    """Hydra's missing option is an OSError too; a full disk is nobody's bug."""
    return isinstance(error, HydraException) or error.errno in DISK_ERRORS


def _sentence(error: BaseException, arguments: Sequence[str]) -> str:
    if isinstance(error, UserError | AgentMismatch):
        return str(error).strip()
    return explain(error, arguments[0].replace("-", "_"), arguments[1:])
