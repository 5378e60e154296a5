"""Ends offline runs of Weights & Biases."""

from __future__ import annotations

import time
from pathlib import Path

import wandb


def finish(folder: Path, seconds: float = 20.0) -> None:
    """Ends the run, and waits for its log to be whole: offline, ``wandb.finish()`` returns some milliseconds before.

    Args:
        folder: Where the run was to be saved.
        seconds: How long to wait at most.
    """
    wandb.finish()
    [run] = (folder / "wandb").glob("offline-run-*")
    service = run / "logs" / "debug-internal.log"
    ends = time.monotonic() + seconds
    while "stream: all finished" not in service.read_text():
        assert time.monotonic() < ends, f"the service of Weights & Biases has not ended the run within {seconds:g} s"
        time.sleep(0.02)
