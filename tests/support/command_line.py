"""The command line, called in this process."""

import os
import sys

from keepdrop.experiments.commands.cli import main


def run_main(*arguments):
    """Run the console entry point in this process; returns its exit code."""
    argv, path, environment = list(sys.argv), list(sys.path), dict(os.environ)
    try:
        main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv[:], sys.path[:] = argv, path
        os.environ.clear()
        os.environ.update(environment)
    return 0
