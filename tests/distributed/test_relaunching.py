"""A process that Lightning's launcher watches, and that is started again when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_sg.distributed.relaunching import RelaunchedProcess

_PATIENCE = 60.0


def started(code: str, folder: Path) -> RelaunchedProcess:
    """A program in ``folder`` that notes each of its starts in ``starts``."""
    command = [sys.executable, "-c", f"import os, signal, time; open('starts', 'a').write('x')\n{code}"]
    environment = {**os.environ, "LOCAL_RANK": "1"}
    return RelaunchedProcess(subprocess.Popen(command, env=environment, cwd=folder), environment)


def end_of(process: RelaunchedProcess) -> int:
    """Looks after it as Lightning does until it has ended."""
    deadline = time.monotonic() + _PATIENCE
    while (code := process.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return code


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


def test_a_killed_process_is_started_again_in_the_same_folder_with_the_same_environment(tmp_path: Path) -> None:
    code = "if len(open('starts').read()) < 3: os.kill(os.getpid(), signal.SIGKILL)"
    code += "\nassert os.environ['LOCAL_RANK'] == '1'"
    process = started(code, tmp_path)
    assert end_of(process) == process.returncode == 0
    assert starts(tmp_path) == 3


@pytest.mark.parametrize(
    ("code", "status"), [("raise SystemExit(3)", 3), ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM)]
)
def test_one_that_ends_by_itself_or_is_told_to_is_not(tmp_path: Path, code: str, status: int) -> None:
    assert end_of(started(code, tmp_path)) == status
    assert starts(tmp_path) == 1


def test_one_that_is_killed_again_and_again_is_given_up(tmp_path: Path) -> None:
    assert end_of(started("os.kill(os.getpid(), signal.SIGKILL)", tmp_path)) == -signal.SIGKILL
    assert starts(tmp_path) == 11


def test_one_that_the_launcher_ends_is_not(tmp_path: Path) -> None:
    process = started("time.sleep(60)", tmp_path)
    process.send_signal(signal.SIGKILL)
    assert process.wait(_PATIENCE) == -signal.SIGKILL
    assert end_of(process) == -signal.SIGKILL
