"""The stopwatch: its edits are those of the README, and the script that they make trains on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.stopwatch import INSTALL, PACE, PLAIN, Lap, _required, decoupled, table
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]


def test_the_readme_says_what_is_typed() -> None:
    readme = (ROOT / "README.md").read_text()
    for text in (INSTALL, "from lightning_sg import Boundary", "Boundary(),", 'strategy="synthetic_gradients"'):
        assert text in readme
    assert "pl.seed_everything(0)" in readme


@pytest.mark.processes
def test_the_changed_script_trains_on_two_processes(tmp_path: Path) -> None:
    script, typed = decoupled(PLAIN)
    assert typed < 120
    (tmp_path / "sine.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    ran = subprocess.run(
        [sys.executable, "sine.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert "The stages on 2 processes" in ran.stderr


def test_typing_counts() -> None:
    laps = [Lap("a", PACE, 10.0), Lap("b", 0, 5.0)]
    assert laps[0].seconds == 70.0
    assert table(laps).splitlines()[-1] == f"| **in all** | {PACE} | 15 | **75** |"


def test_torch_is_lent_with_what_it_requires() -> None:
    assert {"torch", "sympy", "mpmath", "filelock"} <= _required("torch")
    assert "lightning" not in _required("torch")
