"""Starts a process again that was killed, where this package's launcher has started it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from typing import Any

from lightning_sg._compat import SubprocessScriptLauncher

_log = logging.getLogger(__name__)

_MOST = 10  # restarts of one process
_WANTED = {-signal.SIGTERM, -signal.SIGINT}  # somebody wants it to end


class RelaunchedProcess:
    """A process that is started again when a signal has killed it, in the form in which Lightning watches processes.

    Args:
        process: The first one.
        environment: Its environment variables.
    """

    def __init__(self, process: subprocess.Popen[Any], environment: dict[str, str]) -> None:
        self._process = process
        self._folder = _folder_of(process)
        self._environment = environment
        self._left = _MOST
        self._ending = False

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended; ``None`` while it or another in its place runs."""
        return self._process.returncode

    def poll(self) -> int | None:
        """Looks whether it runs, and starts it again if it was killed."""
        code = self._process.poll()
        if code is None or code >= 0 or code in _WANTED or self._ending or not self._left:
            return code
        self._left -= 1
        _log.warning(
            "The process with LOCAL_RANK=%s was killed by signal %d. It is started again, and the others go on.",
            self._environment["LOCAL_RANK"],
            -code,
        )
        self._process = subprocess.Popen(self._process.args, env=self._environment, cwd=self._folder)
        return None

    def send_signal(self, number: int) -> None:
        """Sends it a signal; from then on it is not started again."""
        self._ending = True
        self._process.send_signal(number)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end."""
        return self._process.wait(timeout)


def _folder_of(process: subprocess.Popen[Any]) -> str | None:
    """The folder that a process was started in, which may not be this one's, as with Hydra; ``None`` if not known."""
    try:
        return os.readlink(f"/proc/{process.pid}/cwd")
    except OSError:
        return None


class RelaunchingLauncher(SubprocessScriptLauncher):
    """Lightning's launcher of subprocesses, but one that is killed is started again."""

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        self.procs: list[Any] = [
            RelaunchedProcess(process, {**os.environ, "LOCAL_RANK": str(place)})
            for place, process in enumerate(self.procs, start=1)
        ]


__all__ = ["RelaunchedProcess", "RelaunchingLauncher"]
