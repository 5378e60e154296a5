"""Notes how much memory each process of a short training takes at most."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_sg.files import write_text_atomically
from lightning_sg.lightning_api import Callback

_FILES = "memory-*.json"


class PeakMemory(Callback):
    """Writes a file with the peak of this process when training ends: of its GPU if it has one, else of the host.

    Args:
        folder: The folder to write to.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes it."""
        peak = _peak(trainer.strategy.root_device)
        if peak is None:
            return
        path = Path(self.folder) / _FILES.replace("*", str(trainer.strategy.global_rank))
        write_text_atomically(path, json.dumps({"rank": trainer.strategy.global_rank, "MiB": peak}))


def _peak(device: torch.device) -> float | None:
    """In MiB; ``None`` where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def read_memory(folder: Path) -> list[float]:
    """The peaks in MiB that the processes have written, from the first stage to the last."""
    found = [json.loads(path.read_text()) for path in folder.glob(_FILES)]
    return [each["MiB"] for each in sorted(found, key=lambda each: -each["rank"])]


__all__ = ["PeakMemory", "read_memory"]
