"""What the kernel is asked for: orphans, file systems and networks of a round's own, and who descends from whom."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_CLONE_NEWNS = 0x00020000
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """This process gets SIGKILL when its parent ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """What descends from this process becomes its child when the parent ends."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def mount_disk(folder: Path, size: int) -> None:
    """Puts a file system of ``size`` bytes in memory at ``folder``; it is this process's own, and ends with it.

    Raises:
        OSError: If this user may not.
    """
    if _libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "may not make a mount namespace")
    for command in ("mount --make-rprivate /", f"mount -t tmpfs -o size={size} none {folder}"):
        found = subprocess.run(command.split(), capture_output=True, text=True)
        if found.returncode:
            raise OSError(f"`{command}` failed: {found.stderr.strip()}")


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in children for found in (int(child), *descendants(int(child)))]


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def kill_tree(pid: int) -> None:
    """Ends a process and all that descends from it."""
    for each in (*descendants(pid), pid):
        send(each, signal.SIGKILL)


def send(pid: int, number: int) -> None:
    """Sends a signal to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def free_port() -> int:
    """A port that nobody listens on, below the range that the kernel takes ports of connections from."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def set_device(up: bool, device: str) -> None:
    """Takes a network device of this process's network up or down."""
    subprocess.run(["ip", "link", "set", device, "up" if up else "down"], check=True)


__all__ = [
    "adopt_orphans",
    "descendants",
    "die_with_parent",
    "free_port",
    "is_alive",
    "kill_tree",
    "mount_disk",
    "send",
    "set_device",
]
