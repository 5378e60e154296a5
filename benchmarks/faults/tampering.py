"""Spoils checkpoints: cuts them short, flips a bit, plants code."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import torch

#: In the folder of a training: there once planted code has run.
EXECUTED = "executed"


class Planted:
    """Runs code when it is unpickled.

    Args:
        mark: The folder that it makes.
    """

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._mark,)


def files_of(checkpoint: Path) -> list[Path]:
    """The file, or the files of a folder of shards."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file()) if checkpoint.is_dir() else [checkpoint]


def truncate(checkpoint: Path, draw: random.Random) -> None:
    """Cuts a file short."""
    path = draw.choice(files_of(checkpoint))
    os.truncate(path, draw.randrange(path.stat().st_size))


def flip(checkpoint: Path, draw: random.Random) -> None:
    """Flips one bit of a file."""
    path = draw.choice(files_of(checkpoint))
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def plant(checkpoint: Path, draw: random.Random, mark: Path) -> None:
    """Plants code, as somebody would who can write the file and everything beside it: checksums go."""
    for beside in checkpoint.parent.iterdir():
        if beside.is_file() and beside.suffix != ".ckpt":
            beside.unlink()
    if not checkpoint.is_dir():
        whole = torch.load(checkpoint, map_location="cpu", weights_only=False)
        torch.save({**whole, "planted": Planted(mark)}, checkpoint)
        return
    path = draw.choice([each for each in files_of(checkpoint) if each.name in ("rest.pt", ".metadata")])
    if path.name == "rest.pt":
        torch.save({**torch.load(path, weights_only=False), "planted": Planted(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Planted(mark)))


__all__ = ["EXECUTED", "Planted", "files_of", "flip", "plant", "truncate"]
