"""Lightning's command line, with this package's options, help and strategy."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from lightning_utilities.core.imports import RequirementCache

import lightning_sg  # registers strategy="synthetic_gradients", too
from lightning_sg.lightning_api import LightningCLI, pl
from lightning_sg.which_lightning import CHOICE, VARIABLE, is_loaded

#: What the commands that read a configuration need: Lightning's own and ``plan``.
JSONARGPARSE = RequirementCache("jsonargparse[signatures]>=4.39")

#: The exit status for wrong arguments.
_USAGE = 2


def run_lightning(args: Sequence[str] | None) -> None:
    """Runs one of Lightning's commands.

    Args:
        args: The command and its options; by default the arguments of the process.

    Raises:
        SystemExit: If jsonargparse is missing or the arguments are wrong.
    """
    usages = {name: {"usage": f"lightning-sg {name} --config FILE [OPTIONS]"} for name in LightningCLI.subcommands()}
    # argparse begins every command's own usage with the main parser's.
    _lightning(None if args is None else list(args), run=True, parser_kwargs={"usage": "lightning-sg", **usages})


def build(name: str, description: str, args: Sequence[str]) -> LightningCLI:
    """Makes what a configuration describes, for a command that does something else with it.

    Args:
        name: The command, for its help.
        description: What it does, for its help.
        args: Its options.

    Returns:
        What has ``model``, ``datamodule`` and ``trainer``.

    Raises:
        SystemExit: If jsonargparse is missing or the arguments are wrong.
    """
    kwargs = {
        "prog": f"lightning-sg {name}",
        "usage": f"lightning-sg {name} --config FILE [OPTIONS]",
        "description": description,
    }
    return _lightning(list(args), run=False, parser_kwargs=kwargs)


def versions() -> str:
    """The versions of this package and of those that it stands on, in one line."""
    lightning = f"{CHOICE.package} {version(CHOICE.package.replace('_', '-'))}"
    return f"lightning-sg {lightning_sg.__version__} ({lightning}, torch {torch.__version__})"


def _lightning(args: list[str] | None, *, run: bool, parser_kwargs: dict[str, Any]) -> LightningCLI:
    """Lightning's command line: with ``run`` it executes a subcommand, otherwise it only builds the objects."""
    if not JSONARGPARSE:
        raise SystemExit('The command line needs jsonargparse: pip install "lightning-sg[cli]"')
    from lightning_sg.cli.help import Parser
    from lightning_sg.cli.overrides import add_options, apply_options

    class CommandLine(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            add_options(parser)

        def before_instantiate_classes(self) -> None:
            apply_options(self.config if self.subcommand is None else self.config[self.subcommand])

    # `python -m` puts the current directory on the path; an installed script does not.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        return CommandLine(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            parser_kwargs=parser_kwargs,
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


__all__ = ["JSONARGPARSE", "build", "run_lightning"]
