"""Runs one measurement in processes of its own, one thread each, and reads back what it found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_workers(module: str, arguments: list[str], copies: int = 1) -> list[Any]:
    """Runs ``python -m module`` with ``--out FILE``, in ``copies`` at the same time.

    Args:
        module: A benchmark that writes its result as JSON to the file it is given.
        arguments: Its other arguments.
        copies: How many to run side by side.

    Returns:
        What each copy wrote.

    Raises:
        RuntimeError: If one fails; the message ends with its last output.
    """
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(copy) for copy in range(copies)]
        processes = []
        for out in outs:
            command = [sys.executable, "-m", module, *arguments, "--out", str(out)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(_free_port())}
            with out.with_suffix(".log").open("wb") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        for process, out in zip(processes, outs):
            if process.wait(timeout=3600):
                tail = out.with_suffix(".log").read_text()[-2000:]
                raise RuntimeError(f"`{' '.join(arguments)}` failed:\n{tail}")
        return [json.loads(out.read_text()) for out in outs]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
