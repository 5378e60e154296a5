"""Writes files so that a crash, a kill or a full disk leaves the earlier file intact."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def part_of(path: Path) -> Path:
    """Where a file or folder is written before it takes its place: beside it, under a hidden name."""
    return path.with_name(f".{apart(path.name)}.part")


def apart(name: str) -> str:
    """The name for a companion of a checkpoint, which Lightning must not mistake for a checkpoint.

    Lightning takes every file with ``hpc_ckpt_`` in its name for one that it saved on SLURM, and all digits after that
    for its number.
    """
    return name.replace("hpc_ckpt_", "hpc_ckpt-")


def local_path(path: str | Path) -> Path | None:
    """A path as Lightning takes it, on this machine; ``None`` for one on another, such as ``s3://bucket/last.ckpt``."""
    text = str(path).removeprefix("file://")
    return None if "://" in text else Path(text).expanduser()


@contextmanager
def write_atomically(path: str | Path, publish: Callable[[Path, Path], object] = os.replace) -> Iterator[BinaryIO]:
    """Opens a new file that takes the place of ``path`` once it is complete and on disk.

    The file is beside ``path``, because only a rename within one file system is atomic. Without the two syncs, a power
    cut could leave the new name with old contents, or with none.

    Args:
        path: The file to write. Its folder must exist. A link is replaced, not followed.
        publish: Puts the complete file, its first argument, in the place of ``path``, its second.

    Yields:
        The file, for binary writing.

    Raises:
        OSError: If the file cannot be written; it names ``path``, which is unchanged. Whatever else the caller raises
            leaves ``path`` unchanged too.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe: nothing there to preserve
        with path.open("wb") as file:
            yield file
        return
    part = part_of(path)
    own: os.stat_result | None = None
    try:
        remove(part)  # left by a process that was killed
        with part.open("xb") as file:
            own = os.fstat(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not _is(part, own):
            raise OSError(errno.EBUSY, "another process is writing the same file")
        publish(part, path)
    except BaseException as error:
        if own is not None and _is(part, own):
            part.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            reason = f"{error.strerror or error}; an earlier file of this name is unchanged"
            raise OSError(error.errno or errno.EIO, reason, str(path)) from error
        raise
    sync_folder(path.parent)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Writes a text file as UTF-8; see :func:`write_atomically`."""
    with write_atomically(path) as file:
        file.write(text.encode())


def replace(new: Path, path: Path) -> None:
    """Puts a complete file or folder in the place of ``path``, where a file, a folder, a link or nothing may be.

    On Linux the two trade places at once. Elsewhere, if one of them is a folder, there is a moment without ``path``;
    what was there is then in ``.<name>.old``.

    Args:
        new: What goes there, in the same folder and on disk.
        path: Where it goes.
    """
    if not path.is_symlink() and not path.exists():
        new.rename(path)
    elif _exchange(new, path):
        sync_folder(path.parent)
        remove(new)
    else:
        old = path.with_name(f".{apart(path.name)}.old")
        remove(old)
        path.rename(old)
        new.rename(path)
        sync_folder(path.parent)
        remove(old)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut, where the file system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _is(path: Path, found: os.stat_result) -> bool:
    """Whether ``path`` is still the file of which this was found, not one that another process has made since."""
    try:
        return os.path.samestat(os.stat(path), found)
    except OSError:
        return False


def _exchange(one: Path, other: Path) -> bool:
    """Has two paths trade places at once; whether the system can."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    done: int = rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return done == 0


__all__ = [
    "apart",
    "local_path",
    "part_of",
    "remove",
    "replace",
    "sync_folder",
    "write_atomically",
    "write_text_atomically",
]
