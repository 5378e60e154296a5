"""The command line: Lightning's own, with this package imported; ``plan``, ``report``, ``timeline``, ``merge``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from lightning_utilities.core.imports import RequirementCache

import lightning_sg  # noqa: F401  registers strategy="synthetic_gradients"

_JSONARGPARSE = RequirementCache("jsonargparse[signatures]>=4.39")


def main(args: Sequence[str] | None = None) -> None:
    """Runs Lightning's command line (``fit`` and its kin), or ``plan``, ``report``, ``timeline`` or ``merge``.

    Model and data come from the configuration by ``class_path``; classes in the current directory are found.

    Args:
        args: The arguments; by default those of the process. With ``start_method="popen"`` and several devices,
            leave it so: the processes are started with the arguments of this one.

    Raises:
        SystemExit: If jsonargparse is not installed, the arguments are wrong, or no report can be made.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    # Before Lightning's: these train nothing, and need no jsonargparse.
    if arguments[:1] == ["report"]:
        from lightning_sg.tools.report.command import main as report

        report(arguments[1:])
        return
    if arguments[:1] == ["timeline"]:
        from lightning_sg.tools.timeline.command import main as timeline

        timeline(arguments[1:])
        return
    if arguments[:1] == ["merge"]:
        from lightning_sg.checkpoint.merge import main as merge

        merge(arguments[1:])
        return
    if not _JSONARGPARSE:
        raise SystemExit('The command line needs jsonargparse: pip install "lightning-sg[cli]"')
    # `python -m` puts the current directory on the path; an installed script does not.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    planning = arguments[:1] == ["plan"]
    if planning:
        args = arguments[1:]
        # No process is started that would take the arguments of this one.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    cli = LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_kwargs={
            "prog": "lightning-sg",
            "description": "Trains, validates and tests a LightningModule, with synthetic gradients at its boundaries. "
            "'lightning-sg plan --config FILE' says what the split of a configuration would be, "
            "'lightning-sg report RUN' draws what a run has logged, 'lightning-sg timeline FOLDER' what each process "
            "did when, 'lightning-sg merge FOLDER FILE' makes one checkpoint of shards; see their --help.",
        },
        # A second run of a logger that reuses its directory (WandbLogger) would stop at the first one's file.
        save_config_kwargs={"overwrite": True},
        run=not planning,
        args=None if args is None else list(args),
    )
    if planning:
        from lightning_sg.tools.plan.command import show

        show(cli.model, cli.datamodule, cli.trainer)


__all__ = ["main"]
