"""Trains a few steps of a configuration in a process of its own, and reads what they took and what they logged."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import pl
from lightning_sg.tools.report.read import read_run
from lightning_sg.tools.timeline.command import read
from lightning_sg.tools.timeline.spans import batches_of, shares_of

#: Steps at the start that are not timed: those of start-up.
SKIPPED = 10


@dataclass(frozen=True)
class Measured:
    """What a short training showed.

    Attributes:
        milliseconds: The median time from batch to batch, of the slowest process.
        shares: How each process's time divides into kinds of work, from the first stage to the last.
        losses: What the model logged in training, by name: the mean of the last quarter of the steps.
        cosines: The cosine at each boundary, the same way.
    """

    milliseconds: float
    shares: list[dict[str, float]]
    losses: dict[str, float]
    cosines: dict[str, float]

    @property
    def processes(self) -> int:
        """The number of processes."""
        return len(self.shares)


def measure(arguments: Sequence[str], steps: int, folder: Path) -> Measured:
    """Runs ``lightning-sg fit`` for a few steps.

    Args:
        arguments: Its options.
        steps: How many steps are timed, after :data:`SKIPPED` others.
        folder: An empty folder, for what it writes.

    Raises:
        SyntheticGradientsError: If the training fails, with the end of what it printed.
    """
    folder.mkdir()
    options = [
        f"--trainer.max_steps={SKIPPED + steps}",
        "--trainer.max_epochs=-1",
        "--trainer.limit_val_batches=0",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.logger={pl.__name__}.loggers.CSVLogger",
        f"--trainer.logger.save_dir={folder}",
        "--trainer.logger.name=run",
        "--trainer.profiler=lightning_sg.Timeline",
        f"--trainer.profiler.dirpath={folder}",
        f"--trainer.profiler.skip={SKIPPED}",
        f"--trainer.profiler.batches={steps}",
    ]
    command = [sys.executable, "-m", "lightning_sg", "fit", *arguments, *options]
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "LOCAL_RANK")}
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        raise SyntheticGradientsError(f"A training of {SKIPPED + steps} steps failed. It said:\n{ran.stdout[-3000:]}")
    return _measured(folder)


def _measured(folder: Path) -> Measured:
    spans = list(read(folder).values())
    gaps = [
        [after.start - before.start for before, after in itertools.pairwise(batches_of(process))] for process in spans
    ]
    run = read_run(str(folder / "run"))
    return Measured(
        1000 * max(statistics.median(process) for process in gaps if process),
        [shares_of(process) for process in spans],
        {name: _last(series.values) for name, series in run.metrics.items() if not name.startswith("sg/")},
        {name: _last(by["cosine"].values) for name, by in run.boundaries.items() if "cosine" in by},
    )


def _last(values: Sequence[float]) -> float:
    """The mean of the last quarter."""
    return statistics.fmean(list(values)[-max(1, len(values) // 4) :])


__all__ = ["SKIPPED", "Measured", "measure"]
