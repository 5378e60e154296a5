"""What a training was like, in a few lines when it ends: time a step, alignment at each boundary, what to do next."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_sg.lightning_api import LOGGER

_log = logging.getLogger(LOGGER)

#: The most steps whose times are kept: the last ones say what the speed has come to.
_KEPT = 200
#: Below these cosines, what to say of a boundary.
_WORDS = (
    (0.0, "predictions point away from their targets; the guard falls back where that lasts"),
    (0.1, "hardly aligned on single batches, which by itself says little"),
    (0.5, "aligned in part"),
    (1.1, "well aligned"),
)


class RunSummary:
    """Collects what the summary says, in the process that has the loggers."""

    def __init__(self) -> None:
        self._gaps: list[float] = []
        self._before: float | None = None

    def tick(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self._before is not None:
            self._gaps = [*self._gaps[1 - _KEPT :], now - self._before]
        self._before = now

    def pause(self) -> None:
        """Something other than training comes next: the time until the next step does not count."""
        self._before = None

    def lines(self, metrics: Mapping[str, Any], boundaries: Iterable[str], folder: str | None) -> list[str]:
        """The summary; nothing if no boundary has had a target.

        Args:
            metrics: What was logged last, by name.
            boundaries: All boundaries, in the order in which they are named.
            folder: Where the run's log is, for the command that shows more.
        """
        cosines = {name: float(metrics[key]) for name in boundaries if (key := f"sg/{name}/cosine") in metrics}
        if not cosines:
            return []
        said = ["Synthetic gradients at the end of this run:"]
        if self._gaps:
            typical = 1000 * statistics.median(self._gaps)
            said.append(f"  {typical:.1f} ms a step, the median of the last {len(self._gaps)}")
        for name, cosine in cosines.items():
            words = next((words for below, words in _WORDS if cosine < below), "not a number")
            said.append(f"  boundary '{name}': cosine {cosine:.2f} in the batch logged last: {words}")
        command = f": lightning-sg report {folder} --baseline PLAIN_RUN" if folder else ""
        return [*said, f"  The task's metric decides. Compare it with plain backpropagation (boundaries=[]){command}"]

    def say(self, trainer: Any, boundaries: Iterable[str]) -> None:
        """Logs the summary, where the loggers are."""
        if trainer.is_global_zero:
            folder = next((each.log_dir for each in trainer.loggers if getattr(each, "log_dir", None)), None)
            for line in self.lines(trainer.callback_metrics, boundaries, folder):
                _log.info(line)
        self._gaps, self._before = [], None


__all__ = ["RunSummary"]
