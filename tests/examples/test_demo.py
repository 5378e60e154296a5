"""The demo runs from its command to its plot."""

from __future__ import annotations

import subprocess
import sys


def test_the_demo_runs_to_its_plot(tmp_path):
    """As ``make demo`` runs it, for a shorter time."""
    command = [sys.executable, "-m", "examples.demo", "--epochs", "2", "--outputs", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "Decoupled, training went at" in ended.stdout
    assert "net.4: " in ended.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
