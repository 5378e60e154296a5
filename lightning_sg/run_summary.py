"""What a training was like, in a few lines when it ends: time a step, alignment at each boundary, what to do next."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_sg.lightning_api import LOGGER
from lightning_sg.step_clock import Shares

_log = logging.getLogger(LOGGER)

#: Below these cosines, what to say of a boundary.
_WORDS = (
    (0.0, "predictions point away from their targets; the guard falls back where that lasts"),
    (0.1, "hardly aligned on single batches, which by itself says little"),
    (0.5, "aligned in part"),
    (1.1, "well aligned"),
)


@dataclass(frozen=True)
class Times:
    """What the steps of a run took.

    Attributes:
        milliseconds: The median of the newest steps; ``None`` if there were too few.
        steps: How many these are.
        shares: How each process has spent its time, by the boundary at the end of its stages; ``""`` where the loss is.
    """

    milliseconds: float | None = None
    steps: int = 0
    shares: Mapping[str, Shares] = field(default_factory=dict)


def summarize(trainer: Any, boundaries: Iterable[str], times: Times) -> None:
    """Logs the summary, where the loggers are."""
    if trainer.is_global_zero:
        for line in lines(trainer.callback_metrics, boundaries, times, _command(trainer)):
            _log.info(line)


def lines(metrics: Mapping[str, Any], boundaries: Iterable[str], times: Times, command: str) -> list[str]:
    """The summary; nothing if no boundary has had a target.

    Args:
        metrics: What was logged last, by name.
        boundaries: All boundaries, in the order in which they are named.
        times: What steps took, in which process.
        command: The command that shows more, or what is missing for it.
    """
    order = list(boundaries)
    cosines = {name: float(metrics[key]) for name in order if (key := f"sg/{name}/cosine") in metrics}
    if not cosines:
        return []
    said = ["Synthetic gradients at the end of this run:", *_times(times, order)]
    for name, cosine in cosines.items():
        words = next((words for below, words in _WORDS if cosine < below), "not a number")
        said.append(f"  boundary '{name}': cosine {cosine:.2f} in the batch logged last: {words}")
    return [*said, f"  The task's metric decides. Compare it with plain backpropagation (boundaries=[]): {command}"]


def _times(times: Times, order: Sequence[str]) -> list[str]:
    """The time of a step, and a table of what the processes did in it."""
    if times.milliseconds is None:
        return []
    said = [f"  {times.milliseconds:.1f} ms a step, the median of the last {times.steps}"]
    names = [name for name in (*order, "") if name in times.shares]
    if not names:
        return said
    kinds = [each.name for each in fields(Shares)]
    rows = [["process", *kinds]]
    for place, name in enumerate(names):
        shares = [f"{getattr(times.shares[name], kind):.0%}" for kind in kinds]
        rows.append([label_of(name, place, len(names)), *shares])
    widths = [max(len(row[column]) for row in rows) for column in range(len(kinds) + 1)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        said.append("  " + "  ".join(cells))
    return said


def label_of(name: str, place: int, processes: int) -> str:
    """What a process is called: by its rank, and where its stages end."""
    if processes == 1:
        return "this one"
    end = f"'{name}'" if name else "the loss"
    return f"rank {processes - 1 - place}, up to {end}"


def is_wandb(logger: Any) -> bool:
    """Whether a logger is Lightning's for Weights & Biases, of either of Lightning's packages."""
    return any(each.__name__ == "WandbLogger" for each in type(logger).__mro__)


def _command(trainer: Any) -> str:
    """The next command: it shows the run beside a plain one."""
    folder = next((found for each in trainer.loggers if (found := folder_of(each))), None)
    if folder is None:
        return "train both with a logger, and draw them with lightning-sg report RUN --baseline PLAIN_RUN"
    return f"lightning-sg report {folder} --baseline PLAIN_RUN"


def folder_of(logger: Any) -> str | None:
    """Where a logger has its run on disk, in a form that ``lightning-sg report`` reads; ``None`` if nowhere."""
    if is_wandb(logger):
        files = getattr(logger.experiment, "dir", None)  # .../wandb/offline-run-.../files
        return str(Path(files).parent) if isinstance(files, str) and files else None
    folder = getattr(logger, "log_dir", None)
    return str(folder) if folder else None


__all__ = ["Times", "folder_of", "is_wandb", "label_of", "lines", "summarize"]
