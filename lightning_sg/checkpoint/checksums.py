"""Checksums beside checkpoints, in the format of ``sha256sum``, checked on loading where they are there.

They find damage: a flipped bit, a truncated or mixed-up copy. They are no signature: who can change the checkpoint can
change them too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from lightning_sg.errors import CheckpointError
from lightning_sg.files import apart, write_text_atomically

#: The file with the checksums of all files in a folder of shards.
IN_FOLDER = "checksums"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def checksum_of(file: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def beside(path: Path) -> Path:
    """The file with the checksum of a whole checkpoint."""
    return path.with_name(f"{apart(path.name)}.sha256")


def write_checksums(to: Path, checksums: Iterable[tuple[str, str]]) -> None:
    """Writes checksums of files by name, as ``sha256sum`` would; ``sha256sum -c`` checks them."""
    write_text_atomically(to, "".join(f"{checksum}  {name}\n" for name, checksum in checksums))


def read_checksums(path: Path) -> dict[str, str]:
    """The checksums in a file, by name.

    Raises:
        CheckpointError: If the file is damaged.
    """
    try:
        lines = [_LINE.fullmatch(line) for line in path.read_text().splitlines()]
    except UnicodeDecodeError:
        lines = [None]
    if not lines or None in lines:
        raise CheckpointError(f"The checksums in {path} are damaged. Delete that file to load without them.")
    return {line[2]: line[1] for line in lines if line is not None}


def check(file: Path, expected: str, listed_in: Path) -> None:
    """Compares a file with its checksum.

    Args:
        file: The file.
        expected: Its checksum when it was written.
        listed_in: Where that comes from, for the message.

    Raises:
        CheckpointError: If they differ.
    """
    if checksum_of(file) != expected:
        raise CheckpointError(
            f"{file} is not the file that was saved: its checksum differs from the one in {listed_in}. It was damaged "
            f"or replaced. Use an earlier checkpoint, or delete {listed_in} to load this one anyway."
        )


def check_whole(path: Path) -> None:
    """Compares a whole checkpoint with the checksum beside it, if there is one.

    Raises:
        CheckpointError: If they differ.
    """
    listed_in = beside(path.resolve())  # beside the checkpoint that a link leads to
    if listed_in.is_file():
        (expected, *_others) = read_checksums(listed_in).values()
        check(path, expected, listed_in)


__all__ = [
    "IN_FOLDER",
    "beside",
    "check",
    "check_whole",
    "checksum_of",
    "read_checksums",
    "write_checksums",
]
