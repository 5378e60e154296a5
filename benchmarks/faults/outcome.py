"""How a disturbed training ended: each rank's end, and what is left in the folder of its checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sg.checkpoint.sharded import is_sharded, merge


@dataclass
class Ending:
    """The end of one rank.

    Attributes:
        rank: The rank.
        code: Its exit code, negative for a signal; ``None`` if only its launcher knows.
        error: The last error with those that it came from; ``""`` for none.
        digest: A checksum of its weights; ``""`` if it did not come to the end.
        seconds: From the fault to the end.
        killed: Whether the runner had to kill it.
        deaf: Whether it did not even answer SIGTERM.
        log: The end of what it printed.
    """

    rank: int
    code: int | None = None
    error: str = ""
    digest: str = ""
    seconds: float = 0.0
    killed: bool = False
    deaf: bool = False
    log: str = ""


@dataclass
class Outcome:
    """The end of a training.

    Attributes:
        endings: By rank.
        struck: Whether the fault happened.
        seconds: The whole training.
        left: Processes that were left behind.
        checkpoints: What is wrong with checkpoints, in words.
        saved: The names of the checkpoints.
        executed: Whether code that was planted in a checkpoint has run.
    """

    endings: dict[int, Ending]
    struck: bool = False
    seconds: float = 0.0
    left: int = 0
    checkpoints: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    executed: bool = False

    def others(self, rank: int) -> list[Ending]:
        """The ends of all ranks but one."""
        return [ending for ending in self.endings.values() if ending.rank != rank]

    def as_record(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


def problems_of(folder: Path) -> list[str]:
    """What is wrong with the checkpoints in a folder, in words: each must load, and be finite."""
    return [f"{path.name}: {problem}" for path in sorted(folder.glob("*.ckpt")) if (problem := _problem(path))]


def _problem(path: Path) -> str:
    try:
        checkpoint = merge(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=False)
        if path.is_dir() and not is_sharded(path):
            return "not whole"
        bad = [name for name, value in checkpoint["state_dict"].items() if not _is_finite(value)]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return f"not finite: {bad[0]}" if bad else ""


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(value.isfinite().all())


__all__ = ["Ending", "Outcome", "problems_of"]
