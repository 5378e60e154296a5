"""What a short training showed: read from the files that it wrote."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_sg.tools.advise.memory import read_memory
from lightning_sg.tools.report.read import read_run
from lightning_sg.tools.timeline.command import read
from lightning_sg.tools.timeline.spans import batches_of, shares_of

#: Steps at the start that are not timed: those of start-up.
SKIPPED = 10
#: The name of the log in the folder of a short training.
LOG = "run"
#: Kinds of work whose time depends on the model, the predictor or the other processes, and not on taking a step.
_NOT_OVERHEAD = ("compute", "predictor", "exact", "wait")


@dataclass(frozen=True)
class Measured:
    """What a short training showed.

    Attributes:
        milliseconds: The median time from batch to batch, of the slowest process.
        shares: How each process's time divides into kinds of work, from the first stage to the last.
        losses: What the model logged in training, by name: the mean of the last quarter of the steps.
        cosines: The cosine at each boundary, the same way.
        memory: The peak of each process in MiB, in the same order as the shares: of the GPU, or of the host.
    """

    milliseconds: float
    shares: list[dict[str, float]]
    losses: dict[str, float]
    cosines: dict[str, float]
    memory: list[float] = field(default_factory=list)

    @property
    def processes(self) -> int:
        """The number of processes."""
        return len(self.shares)

    @property
    def overhead(self) -> float:
        """Milliseconds of a step that go neither into computing nor into waiting, in the process with most of them."""
        return self.milliseconds * max(1 - sum(each.get(kind, 0.0) for kind in _NOT_OVERHEAD) for each in self.shares)


def read_measured(folder: Path) -> Measured:
    """Reads what a training with :class:`~lightning_sg.Timeline`, a CSVLogger and ``PeakMemory`` wrote.

    Args:
        folder: Where it wrote that.
    """
    spans = list(read(folder).values())
    gaps = [
        [after.start - before.start for before, after in itertools.pairwise(batches_of(process))] for process in spans
    ]
    run = read_run(str(folder / LOG))
    return Measured(
        1000 * max(statistics.median(process) for process in gaps if process),
        [shares_of(process) for process in spans],
        {name: _last(series.values) for name, series in run.metrics.items() if not name.startswith("sg/")},
        {name: _last(by["cosine"].values) for name, by in run.boundaries.items() if "cosine" in by},
        read_memory(folder),
    )


def _last(values: Sequence[float]) -> float:
    """The mean of the last quarter."""
    return statistics.fmean(list(values)[-max(1, len(values) // 4) :])


__all__ = ["LOG", "SKIPPED", "Measured", "read_measured"]
