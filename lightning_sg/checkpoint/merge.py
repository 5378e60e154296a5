"""``lightning-sg merge``: turns a folder of shards into one ordinary checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_sg.checkpoint.plugin import save_whole
from lightning_sg.checkpoint.sharded import merge
from lightning_sg.checkpoint.shards import is_sharded
from lightning_sg.errors import CheckpointError


def main(args: Sequence[str] | None = None) -> None:
    """Merges the shards, writes the file and prints its path.

    Args:
        args: The arguments after ``merge``; by default those of the process.

    Raises:
        SystemExit: If the folder has no shards, one is damaged or refused, or the file exists or cannot be written.
    """
    arguments = parser().parse_args(args)
    if not is_sharded(arguments.folder):
        raise SystemExit(
            f"{arguments.folder} is not a folder of shards: it has no rest.pt. Give the folder that "
            "SyntheticGradientStrategy(checkpoint='sharded') wrote."
        )
    if arguments.file.exists():
        raise SystemExit(f"{arguments.file} already exists; nothing was written. Give a new file name.")
    try:
        save_whole(merge(arguments.folder, weights_only=not arguments.trust), arguments.file)
    except (CheckpointError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(arguments.file)


def parser() -> argparse.ArgumentParser:
    """The arguments of ``merge``."""
    parser = argparse.ArgumentParser(
        prog="lightning-sg merge",
        description="Merges a folder of shards, written with SyntheticGradientStrategy(checkpoint='sharded'), into "
        "one ordinary checkpoint. Plain Lightning can load it, and so can a split over any number of processes. The "
        "whole training state must fit into memory.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder of shards")
    parser.add_argument("file", metavar="FILE", type=Path, help="the checkpoint to write; must not exist")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load more than tensors and plain values, which can run code that somebody put into the folder",
    )
    return parser


__all__ = ["main", "parser"]
