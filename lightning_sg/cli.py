"""The command line: this package's own commands, and all of Lightning's (``fit``, ``test``, ...)."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence

from lightning_utilities.core.imports import RequirementCache

import lightning_sg  # noqa: F401  registers strategy="synthetic_gradients"
from lightning_sg.lightning_api import LightningCLI, pl
from lightning_sg.which_lightning import CHOICE, VARIABLE, is_loaded

#: What the commands that read a configuration need: Lightning's own and ``plan``.
JSONARGPARSE = RequirementCache("jsonargparse[signatures]>=4.39")

#: The exit status for wrong arguments.
_USAGE = 2

_DESCRIPTION = (
    "Trains, validates and tests a LightningModule with synthetic gradients at its boundaries. "
    "'lightning-sg plan --config FILE' shows how a configuration would be split, "
    "'lightning-sg report RUN' draws what a run has logged, "
    "'lightning-sg timeline FOLDER' draws what each process did when, "
    "'lightning-sg merge FOLDER FILE' merges the shards of a checkpoint into one file; see their --help."
)


def main(args: Sequence[str] | None = None) -> None:
    """Runs one of :data:`COMMANDS`, or else Lightning's command line.

    Model and data come from the configuration by ``class_path``; classes in the current directory are found.

    Args:
        args: The arguments; by default those of the process. Leave the default with ``start_method="popen"`` and
            several devices: Lightning starts the other processes with this process's arguments.

    Raises:
        SystemExit: If jsonargparse is missing, the arguments are wrong, or the command fails.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is not None:
        command(arguments[1:])
    else:
        _lightning(None if args is None else arguments, run=True)


def _plan(arguments: list[str]) -> None:
    from lightning_sg.tools.plan.command import show

    # Lightning warns that new processes would not get these arguments; planning starts none.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    cli = _lightning(arguments, run=False)
    show(cli.model, cli.datamodule, cli.trainer)


def _report(arguments: list[str]) -> None:
    from lightning_sg.tools.report.command import main as report

    report(arguments)


def _timeline(arguments: list[str]) -> None:
    from lightning_sg.tools.timeline.command import main as timeline

    timeline(arguments)


def _merge(arguments: list[str]) -> None:
    from lightning_sg.checkpoint.merge import main as merge

    merge(arguments)


#: This package's own commands by name. Each imports what it needs only when it runs.
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "plan": _plan,
    "report": _report,
    "timeline": _timeline,
    "merge": _merge,
}


def _lightning(args: list[str] | None, *, run: bool) -> LightningCLI:
    """Lightning's command line: with ``run`` it executes a subcommand, otherwise it only builds the objects."""
    if not JSONARGPARSE:
        raise SystemExit('The command line needs jsonargparse: pip install "lightning-sg[cli]"')
    # `python -m` puts the current directory on the path; an installed script does not.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        return LightningCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_kwargs={"prog": "lightning-sg", "description": _DESCRIPTION},
            # WandbLogger reuses its directory, and a second run would stop at the first one's config file.
            save_config_kwargs={"overwrite": True},
            run=run,
            args=args,
        )
    except SystemExit as ended:
        if ended.code == _USAGE and is_loaded(CHOICE.other):
            print(
                f"The configuration has something of `{CHOICE.other}` in it, but this command takes Lightning from "
                f"`{CHOICE.package}`, because {CHOICE.reason}. Set {VARIABLE}={CHOICE.other} to take that one.",
                file=sys.stderr,
            )
        raise


__all__ = ["COMMANDS", "JSONARGPARSE", "main"]
