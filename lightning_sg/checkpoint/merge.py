"""``lightning-sg merge``: one ordinary checkpoint from a folder of shards."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lightning_sg.checkpoint.sharded import is_sharded, merge


def main(arguments: list[str]) -> None:
    """``lightning-sg merge FOLDER FILE``."""
    parser = argparse.ArgumentParser(
        prog="lightning-sg merge",
        description="Makes an ordinary checkpoint, for any number of processes and for plain Lightning, from a folder "
        'that SyntheticGradientStrategy(checkpoint="sharded") wrote. The whole state must fit into memory.',
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path, help="must not exist")
    options = parser.parse_args(arguments)
    if not is_sharded(options.folder):
        raise SystemExit(f"{options.folder} is no folder of shards: it has no rest.pt.")
    if options.file.exists():
        raise SystemExit(f"{options.file} exists; nothing was written.")
    torch.save(merge(options.folder), options.file)
    print(options.file)


__all__ = ["main"]
