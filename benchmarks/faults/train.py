"""``python -m benchmarks.faults.train FILE``: the training that is in a file, as a user's script."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch

from benchmarks.faults.job import Job


def main(path: Path) -> None:
    """Runs it."""
    torch.set_num_threads(1)
    job: Job = pickle.loads(path.read_bytes())
    job.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
