"""A Lightning profiler that keeps when everything happened, so that the stages can be seen side by side."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities import rank_zero_only

from lightning_sg.profiling import BATCH
from lightning_sg.tools.timeline.spans import Span, shares_of

_log = logging.getLogger("lightning.pytorch")


class Timeline(Profiler):
    """Records a window of training batches as a timeline: ``Trainer(profiler=Timeline())``.

    Every process writes ``fit-<filename>-<rank>.json`` in the Chrome trace format, for ``chrome://tracing`` or
    Perfetto; ``python -m lightning_sg timeline FOLDER`` puts those of all stages together, and draws them. Times are
    those of the host: on a GPU, kernels run after the action that launches them.

    Args:
        dirpath: The folder to write to; by default the logger's, or the trainer's ``default_root_dir``.
        filename: Part of the files' names.
        skip: Training batches before the window; the first ones are slow.
        batches: Training batches in the window.

    Raises:
        ValueError: If the window is empty or begins before the first batch.
    """

    def __init__(
        self, dirpath: str | Path | None = None, filename: str = "timeline", skip: int = 10, batches: int = 30
    ) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        if skip < 0 or batches < 1:
            raise ValueError(f"Timeline needs skip >= 0 and batches >= 1, not {skip} and {batches}.")
        self.skip = skip
        self.batches = batches
        self.spans: list[Span] = []
        self._seen = 0
        self._open: list[tuple[str, float]] = []
        # Processes agree about the time of day, and within a process a clock that never jumps is to be had.
        self._epoch = time.time() - time.perf_counter()

    def start(self, action_name: str) -> None:
        """An action begins."""
        if action_name == BATCH:
            self._seen += 1
        self._open.append((action_name, time.perf_counter()))

    def stop(self, action_name: str) -> None:
        """An action ends; those within it that an exception has left open end with it."""
        end = time.perf_counter()
        while self._open:
            name, begun = self._open.pop()
            if self.skip < self._seen <= self.skip + self.batches:
                self.spans.append(Span(name, self._epoch + begun, end - begun))
            if name == action_name:
                return

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """A run begins."""
        super().setup(stage, local_rank, log_dir)
        self.spans, self._seen, self._open = [], 0, []

    def summary(self) -> str:
        """How the time of the window divides into kinds of work, in this process."""
        shares = [f"{kind} {share:.1%}" for kind, share in shares_of(self.spans).items()]
        return f"Timeline of rank {_rank()}: {', '.join(shares)}." if shares else ""

    def describe(self) -> None:
        """Writes the file of a training that was recorded, and logs the summary: each process its own."""
        if self._stage != "fit" or not self.spans:
            return
        path = os.path.join(str(self.dirpath or "."), f"fit-{self.filename}-{_rank()}.json")
        files = get_filesystem(path)
        files.makedirs(os.path.dirname(path), exist_ok=True)
        with files.open(path, "w") as file:
            json.dump({"traceEvents": [span.event(_rank()) for span in self.spans]}, file)
        _log.info(self.summary())


def _rank() -> int:
    # Not Lightning's `local_rank`: it is told to profilers only where there are replicas.
    return int(getattr(rank_zero_only, "rank", None) or 0)


__all__ = ["Timeline"]
