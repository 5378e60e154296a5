"""Finds the command that was asked for and runs it; lists all commands if none was."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence

from lightning_sg.cli.commands import COMMANDS, overview

#: The exit status for wrong arguments.
USAGE = 2


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: The arguments; by default those of the process. Leave the default with ``start_method="popen"`` and
            several devices: Lightning starts the other processes with this process's arguments.

    Raises:
        SystemExit: If there is no such command, jsonargparse is missing, the arguments are wrong, or the command fails.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        print(overview())
    elif first in ("-V", "--version"):
        from lightning_sg.cli.lightning import versions

        print(versions())
    elif first in COMMANDS:
        _run(COMMANDS[first].run, arguments, args)
    elif first.startswith("-"):  # Lightning takes `--config FILE` before the command too
        from lightning_sg.cli.lightning import run_lightning

        run_lightning(None if args is None else arguments)
    else:
        near = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"The commands are {', '.join(COMMANDS)}."
        print(f"lightning-sg has no command '{first}'. {hint}", file=sys.stderr)
        raise SystemExit(USAGE)


def _run(run: Callable[[list[str]], None] | None, arguments: list[str], args: Sequence[str] | None) -> None:
    if run is not None:
        run(arguments[1:])
        return
    from lightning_sg.cli.lightning import run_lightning

    run_lightning(None if args is None else arguments)


__all__ = ["USAGE", "main"]
