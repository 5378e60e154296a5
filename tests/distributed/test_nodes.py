"""Two nodes, each in a network of its own: a killed process restarts the job on both."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.channel import Channel, NoChannelError, address
from tests.models import assert_same_state
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
_PATIENCE = 150.0  # torchrun itself takes most of it


@pytest.fixture
def network() -> Iterator[Channel]:
    try:
        with Channel(2, None, 0.0) as channel:
            yield channel
    except NoChannelError as error:
        pytest.skip(f"two networks need root: {error}")


def agent(
    channel: Channel, port: int, kind: str, mode: str, folder: Path, dies: int, node: int
) -> subprocess.Popen[bytes]:
    """One node's torchrun."""
    where = {
        "static": ["--master-addr", address(0), "--master-port", str(port), "--node-rank", str(node)],
        "c10d": [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={address(0)}:{port}",
            # It would go by the host's name, which is the same on both.
            f"--rdzv-conf=is_host={int(node == 0)},last_call_timeout=1",
            f"--local-addr={address(node)}",
        ],
    }[kind]
    command = [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--max-restarts=2",
        "--monitor-interval=0.5",
        *where,
    ]
    clean = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, *command, "tests/script.py", mode, str(folder)],
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DIES": str(dies)},
        cwd=ROOT,
        stdout=(folder / f"node-{node}.txt").open("w"),
        stderr=subprocess.STDOUT,
        preexec_fn=partial(channel.enter_as, node),
    )


def run(make: Callable[[int], subprocess.Popen[bytes]], folder: Path) -> None:
    """Runs the job on both nodes to its end."""
    agents = [make(node) for node in range(2)]
    try:
        deadline = time.monotonic() + _PATIENCE
        for each in agents:
            each.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail("The job did not end.\n" + "\n".join(file.read_text() for file in sorted(folder.glob("node-*"))))
    finally:
        for each in agents:
            each.terminate()
        for each in agents:
            each.wait(20)
    for node, each in enumerate(agents):
        assert each.returncode == 0, (folder / f"node-{node}.txt").read_text()


@pytest.mark.parametrize(("kind", "dies"), [("static", 1), ("c10d", 0)])
def test_a_killed_process_restarts_the_job_on_both_nodes(
    kind: str, dies: int, network: Channel, tmp_path: Path
) -> None:
    ends = {}
    for mode in ("undisturbed", "restarted"):
        (tmp_path / mode).mkdir()
        port = free_port()
        run(partial(agent, network, port, kind, mode, tmp_path / mode, dies), tmp_path / mode)
        ends[mode] = torch.load(tmp_path / mode / "end.pt")
    assert (tmp_path / "restarted" / "died").exists()
    assert_same_state(ends["undisturbed"]["state"], ends["restarted"]["state"], exact=True)
