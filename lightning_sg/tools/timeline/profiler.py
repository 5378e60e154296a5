"""A Lightning profiler that records when each action happened, so that stages can be compared side by side."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from lightning_sg.arguments import MOST_BATCHES, checked, optional, path, text, whole
from lightning_sg.files import write_text_atomically
from lightning_sg.lightning_api import LOGGER, Profiler, get_filesystem, rank_zero_only
from lightning_sg.profiling import BATCH
from lightning_sg.tools.timeline.chrome import events_of, trace_text
from lightning_sg.tools.timeline.spans import Span, shares_of

_log = logging.getLogger(LOGGER)


class Timeline(Profiler):
    """Records what each process does during a window of training batches: ``Trainer(profiler=Timeline())``.

    Every process writes ``fit-<filename>-<rank>.json`` in the Chrome trace format, for ``chrome://tracing`` or
    Perfetto. ``python -m lightning_sg timeline FOLDER`` merges these files and draws them. Times are host times: on a
    GPU, kernels run after the action that launches them.

    Args:
        dirpath: The folder to write to; by default the logger's, or the trainer's ``default_root_dir``.
        filename: Part of the names of the files.
        skip: The number of training batches before the window. The first ones are slow.
        batches: The number of training batches in the window, at most 100,000.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, or a path or name is empty.
    """

    def __init__(
        self, dirpath: str | Path | None = None, filename: str = "timeline", skip: int = 10, batches: int = 30
    ) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        checked("Timeline", "dirpath", dirpath, optional(path()))
        checked("Timeline", "filename", filename, text())
        self.skip = checked("Timeline", "skip", skip, whole(0, MOST_BATCHES))
        self.batches = checked("Timeline", "batches", batches, whole(1, 100_000))
        self.spans: list[Span] = []
        self._seen = 0
        self._open: list[tuple[str, float]] = []
        # Processes share only the time of day, which may jump. So read it once, and go on with a clock that never does.
        self._epoch = time.time() - time.perf_counter()

    def start(self, action_name: str) -> None:
        """Notes the start of an action."""
        if action_name == BATCH:
            self._seen += 1
        self._open.append((action_name, time.perf_counter()))

    def stop(self, action_name: str) -> None:
        """Records an action that ends. Actions inside it that an exception left open end with it."""
        end = time.perf_counter()
        while self._open:
            name, begun = self._open.pop()
            if self.skip < self._seen <= self.skip + self.batches:
                self.spans.append(Span(name, self._epoch + begun, end - begun))
            if name == action_name:
                return

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Forgets the last run."""
        super().setup(stage, local_rank, log_dir)
        self.spans, self._seen, self._open = [], 0, []

    def summary(self) -> str:
        """The share of each kind of work in this process's time in the window."""
        shares = [f"{kind} {share:.1%}" for kind, share in shares_of(self.spans).items()]
        return f"Timeline of rank {_rank()}: {', '.join(shares)}." if shares else ""

    def describe(self) -> None:
        """Writes the trace file and logs the summary, on every process, if training was recorded."""
        if self._stage != "fit" or not self.spans:
            return
        path = os.path.join(str(self.dirpath or "."), f"fit-{self.filename}-{_rank()}.json")
        files = get_filesystem(path)
        files.makedirs(os.path.dirname(path), exist_ok=True)
        text = trace_text(events_of(self.spans, _rank()))
        if "://" in path:
            with files.open(path, "w") as file:
                file.write(text)
        else:
            write_text_atomically(path, text)
        _log.info(self.summary())


def _rank() -> int:
    # Lightning passes `local_rank` to profilers only if there are replicas.
    return int(getattr(rank_zero_only, "rank", None) or 0)


__all__ = ["Timeline"]
