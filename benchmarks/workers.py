"""Runs one measurement in processes of its own, one thread each, and reads back what it found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.channel import DEVICE, Channel, address

_LONGEST = 3600  # seconds


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
    environments = [{"MASTER_PORT": str(_free_port())} for _ in range(copies)]
    return _run(module, arguments, environments, [None] * copies)


def run_group(module: str, arguments: list[str], ranks: int, channel: Channel | None) -> Any:
    """Runs ``python -m module`` with ``--out FILE`` in ``ranks`` processes, with torchrun's variables.

    Args:
        module: A benchmark whose rank 0 writes the result as JSON to the file it is given.
        arguments: Its other arguments.
        ranks: How many processes.
        channel: The network between them; by default the machine's own.

    Returns:
        What rank 0 wrote.

    Raises:
        RuntimeError: If one fails; the message ends with its last output.
    """
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if channel is not None:
        where |= {"MASTER_ADDR": address(0), "GLOO_SOCKET_IFNAME": DEVICE}
    several = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "run",
    }
    environments = [where | several | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    # `preexec_fn` is unsafe beside threads, of which these commands have none, and nothing else enters a namespace.
    enters: list[Callable[[], None] | None] = [
        None if channel is None else lambda rank=rank: channel.enter_as(rank)  # type: ignore[misc]
        for rank in range(ranks)
    ]
    return _run(module, arguments, environments, enters)[0]


def _run(
    module: str,
    arguments: list[str],
    environments: list[dict[str, str]],
    enters: list[Callable[[], None] | None],
) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(copy) for copy in range(len(environments))]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for out, own, enter in zip(outs, environments, enters):
                command = [sys.executable, "-m", module, *arguments, "--out", str(out)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1", **own}
                with out.with_suffix(".log").open("wb") as log:
                    processes.append(
                        subprocess.Popen(
                            command, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=enter
                        )
                    )
            for process, out in zip(processes, outs):
                if process.wait(timeout=_LONGEST):
                    tail = out.with_suffix(".log").read_text()[-2000:]
                    raise RuntimeError(f"`{' '.join(arguments)}` failed:\n{tail}")
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()  # the others would wait for the one that failed
                    process.wait()
        return [json.loads(out.read_text()) if out.exists() else None for out in outs]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
