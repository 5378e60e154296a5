"""A file system of a few hundred kilobytes, to be filled, and deaths in the middle of a file."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """Mounts a tmpfs of that size on a new folder; skips the test where there is no right to."""
    folder.mkdir()
    mounted = _libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={kilobytes}k".encode())
    if mounted != 0:
        pytest.skip(f"mounting a small file system needs root: {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        _libc.umount2(os.fsencode(folder), _MNT_DETACH)


def forked(work: Callable[[], None]) -> int:
    """Runs in a forked process; returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] & 0x7F
