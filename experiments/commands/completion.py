"""Shell completion: `eval "$(keepdrop -sc install=bash)"`. Commands are completed here, their settings by Hydra."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence

from ...errors import UserError

FLAGS = ("-sc", "--shell-completion")
SHELLS = ("bash", "fish", "zsh")


def complete(arguments: Sequence[str], commands: Iterable[str], enter: Callable[[list[str]], None]) -> None:
    """Answer `keepdrop -sc install=SHELL`, `uninstall=SHELL`, or a shell's `query=SHELL` about `COMP_LINE`.

    Args:
        arguments: what follows the flag.
        commands: names of all commands.
        enter: runs a command line of a command.
    """
    what, _, shell = (arguments[0] if arguments else "").partition("=")
    if what not in ("install", "uninstall", "query") or shell not in SHELLS:
        raise UserError(
            f"{' '.join(arguments) or 'nothing'} came after {FLAGS[0]}; expected install=SHELL or uninstall=SHELL with "
            f"a shell of {', '.join(SHELLS)}."
        )
    if what != "query":
        _print_script(f"{what}={shell}")
        return
    line = os.environ.get("COMP_LINE", "")
    words = line.split()[1:]
    if not words or (len(words) == 1 and not line.endswith(" ")):
        fitting = [name for name in commands if name.startswith(words[0] if words else "")]
        print((" " if shell == "bash" else "\n").join(fitting))
    elif words[0] in commands:
        # Hydra knows nothing of commands: it is asked about the rest of the line.
        os.environ["COMP_LINE"] = line.replace(words[0], "", 1).replace("  ", " ", 1)
        enter([words[0], FLAGS[0], f"query={shell}"])


def _print_script(request: str) -> None:
    """Hydra's script for the shell, for the program `keepdrop` as a whole."""
    from hydra._internal.core_plugins.bash_completion import BashCompletion
    from hydra._internal.core_plugins.fish_completion import FishCompletion

    what, _, shell = request.partition("=")
    sys.argv = ["keepdrop"]
    # The scripts need no configuration, so neither does the plugin that prints them.
    plugin = FishCompletion(None) if shell == "fish" else BashCompletion(None)  # type: ignore[arg-type]
    plugin.install() if what == "install" else plugin.uninstall()
