"""`keepdrop COMMAND ...`: finds the command, runs it, and turns a user's mistake into one sentence."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ...errors import Notice, UserError
from ..config.cli_errors import DISK_ERRORS, check_experiment, check_flags, explain, groups, nearest
from . import completion
from . import help as command_help

COMMANDS = {
    "prune": "shrink a trained CNN: train an agent per layer, remove filters, fine-tune, report",
    "inspect": "show what can be pruned, what hangs on it, and what is skipped and why",
    "profile": "measure what a network's layers take on this device, for targets of time",
    "train-cnn": "train a base network",
    "train-agent": "train the agent of one layer (-m layer=a,b,c trains several)",
    "pretrain": "train one agent over many networks, to be asked about any other",
    "apply": "let trained agents decide on a new checkpoint, without training them",
    "compare": "compare the agent with every other method at equal MACs",
    "iterate": "drop a few filters, train a little, repeat: the interleaved method of the criteria",
    "oracle": "remove each filter alone, and say how well criteria and agents foresee the loss",
    "report": "rebuild the report.html of runs, and compare several",
}
POSITIONAL = {"report": "runs"}  # the list that arguments without a name go to
LOUD = {"inspect"}  # commands whose only output is the answer: --quiet changes nothing
USER_MISTAKE = 2


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a batch system sends before it kills; everything else treats it like Ctrl-C."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM inside raises `Terminated`; left as it is where somebody handles or ignores it already."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> None:
    """Console entry point; exits with 0, with 2 after a user's mistake, with 130 after Ctrl-C and 143 after SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments[:1] == ["--quiet"]:  # as well in front of the command as behind it
        arguments = [*arguments[1:], "--quiet"]
    try:
        with terminable(), notices_on_stderr():
            sys.exit(run(arguments))
    except BrokenPipeError:  # `keepdrop prune --help | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if debug or not _is_mistake(error):
            raise
        print(f"keepdrop: {_sentence(error, arguments)}", file=sys.stderr)
        sys.exit(USER_MISTAKE)
    except KeyboardInterrupt as stop:
        print(f"\nkeepdrop: stopped. {stop}".rstrip(), file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)


@contextmanager
def notices_on_stderr() -> Iterator[None]:
    """Shows each `Notice` as one line; other warnings stay as they are."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, Notice):
            usual(message, category, *where, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        usual = warnings.showwarning
        warnings.simplefilter("always", Notice)
        warnings.showwarning = show
        yield


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if "--version" in arguments:
        from importlib.metadata import version

        print(f"keepdrop {version('keepdrop')}")
        return 0
    if arguments[0] in completion.FLAGS:
        completion.complete(arguments[1:], COMMANDS, _enter)
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        hint = nearest(command, COMMANDS) or f"expected one of {', '.join(COMMANDS)}."
        raise UserError(f"{command!r} is not a command; {hint}")
    if set(command_help.FLAGS) & set(arguments):
        print(command_help.command_help(command.replace("-", "_")))
        return 0
    if command == "inspect":
        arguments = ["json=true" if argument == "--json" else argument for argument in arguments]
    check_flags(command.replace("-", "_"), arguments[1:])
    check_experiment(command.replace("-", "_"), arguments[1:])
    _enter([command, *_settings(command, arguments[1:])])
    return 0


def _settings(command: str, arguments: Sequence[str]) -> list[str]:
    """What Hydra is given: `--quiet` as the setting it stands for, and bare arguments in the list they belong to."""
    rest = [argument for argument in arguments if argument != "--quiet"]
    if len(rest) < len(arguments) and command not in LOUD:
        rest.append("quiet=true")
    nulled = {f"{name}=null": f"~{name}" for name in groups()}  # Hydra's way to leave a group out
    rest = [nulled.get(each, each) for each in rest]
    if any(each.startswith("resume=") for each in rest):
        # A repeated target belongs to the stored configuration; the command's own may hold null in its place.
        rest = [f"++{each}" if re.match(r"[\w.]+\._target_=", each) else each for each in rest]
    if command not in POSITIONAL:
        return rest
    bare = [each for each in rest if not each.startswith("-") and ("=" not in each or Path(each).exists())]
    quoted = ",".join("'" + each.replace("\\", "\\\\").replace("'", "\\'") + "'" for each in bare)
    named = [each for each in rest if each not in bare]
    return [*named, f"{POSITIONAL[command]}=[{quoted}]"] if bare else named


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
            "keepdrop COMMAND --help  shows a command's settings and examples.",
            "--quiet  results and warnings only;  --debug  the traceback of an error;  --version",
        ]
    )


def _enter(arguments: list[str]) -> None:
    """Run a command: Hydra gets an argument list, and its errors come here instead of being printed by it."""
    sys.argv = [f"keepdrop {arguments[0]}", *arguments[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("KEEPDROP_COMMAND", arguments[0])
    command = arguments[0]
    importlib.import_module(f".{command.replace('-', '_')}", __package__).main()


def _is_mistake(error: Exception) -> bool:
    """Whether a sentence is all there is to say; a full disk is nobody's bug."""
    if isinstance(error, UserError | HydraException | OmegaConfBaseException):
        return True  # Hydra's missing option is an OSError too
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def _sentence(error: BaseException, arguments: Sequence[str]) -> str:
    if isinstance(error, UserError):
        return error.typed.strip()
    return explain(error, arguments[0].replace("-", "_"), arguments[1:])
