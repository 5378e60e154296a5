"""Writes one file of a checkpoint atomically, and loads it without running code from it."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

from lightning_sg.errors import CheckpointError
from lightning_sg.files import write_atomically

#: What torch says when it refuses: the sentence with the reason, among advice on how to load the file all the same.
_REASON = re.compile(r"WeightsUnpickler error:\s*(.*?)(?:\.\s|\n|$)")


def save_file(value: Any, path: Path, publish: Callable[[Path, Path], object] = os.replace) -> str:
    """Writes a file with ``torch.save``, in the place of an earlier one once it is complete and on disk.

    Args:
        value: What to save.
        path: The file.
        publish: See :func:`~lightning_sg.files.write_atomically`.

    Returns:
        Its SHA-256 in hexadecimal digits, computed as it is written.

    Raises:
        OSError: If the disk is full or fails; an earlier file stays as it was.
    """
    with write_atomically(path, publish) as file:
        digesting = _Digesting(file)
        try:
            torch.save(value, digesting)  # type: ignore[arg-type]  # all that torch asks of a file is `write`
        except RuntimeError as error:
            raise disk_error(error) or error from None
    return digesting.checksum


def load_file(file: Path | IO[bytes], name: str | Path, weights_only: bool = True, map_location: Any = "cpu") -> Any:
    """Loads what ``torch.save`` wrote.

    Args:
        file: The file, or a part of one.
        name: What it is, for messages.
        weights_only: Whether to refuse all but tensors, numbers, strings and containers of these. Anything else can run
            code as it is loaded.
        map_location: As for ``torch.load``.

    Raises:
        CheckpointError: If something else is in it, or it is damaged.
    """
    try:
        return torch.load(file, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise (refused(name, _reason(error)) if weights_only else damaged(name, error)) from error
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        if not weights_only and not isinstance(error, (RuntimeError, EOFError, OSError)):
            raise  # of the user's own classes
        raise damaged(name, error) from error


def disk_error(error: BaseException | None) -> OSError | None:
    """What a file system has said, behind an error of torch's that does not say why."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def refused(name: str | Path, reason: str) -> CheckpointError:
    """The error about a file with more in it than plain values."""
    return CheckpointError(
        f"{name} was refused, and nothing in it has run: by default, only tensors, numbers, strings and containers of "
        f"these are loaded ({reason}). If you trust the file, pass weights_only=False to Trainer.fit, validate, test "
        "or predict, or --trust to `lightning-sg merge`; code in the file can then run. Otherwise use another "
        "checkpoint: this one may also be damaged."
    )


def damaged(name: str | Path, reason: object) -> CheckpointError:
    """The error about a file that cannot be read."""
    text = str(reason).strip().split("\n")[0]
    return CheckpointError(
        f"{name} cannot be read: it is damaged or truncated ({type(reason).__name__}: {text}). "
        "Use an earlier checkpoint."
    )


class _Digesting:
    """Passes what is written on to a file, and computes the checksum on the way.

    Args:
        file: The file, open for binary writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Writes and returns the number of bytes."""
        count = self._file.write(data)
        self._digest.update(data)
        return count

    def flush(self) -> None:
        """Flushes the file."""
        self._file.flush()

    @property
    def checksum(self) -> str:
        """Of everything written: SHA-256 in hexadecimal digits."""
        return self._digest.hexdigest()


def _reason(error: Exception) -> str:
    text = str(error)
    found = _REASON.search(text)
    return found[1] if found else text.strip().split("\n")[0]


__all__ = ["damaged", "disk_error", "load_file", "refused", "save_file"]
