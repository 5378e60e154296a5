"""Reads a run from its log: Lightning's metrics.csv, TensorBoard's event files, or those of Weights & Biases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from lightning_sg.tools.report.csv_log import read_csv
from lightning_sg.tools.report.locate import locate
from lightning_sg.tools.report.run import ReportError, Run, Series
from lightning_sg.tools.report.times import take_seconds
from lightning_sg.tools.report.wandb_log import read_wandb


def read_run(path: str | Path) -> Run:
    """Reads a run.

    Args:
        path: A ``metrics.csv``, its folder, a folder of ``version_*`` folders (the newest that has logged something
            is read, and a note names it), a folder of TensorBoard's event files, or one of Weights & Biases
            (``offline-run-...``, or a folder of them).

    Returns:
        Everything that the run has logged.

    Raises:
        ReportError: If there is no log, or it has no values that can be read.
    """
    found, notes = locate(Path(path))
    if found.is_dir():
        from lightning_sg.tools.report.events import read_events

        points, clock = read_events(found)
        epochs = len(set(points.pop("epoch", {}).values()))
    elif found.suffix == ".wandb":
        points, clock = read_wandb(found)
        epochs = len(set(points.pop("epoch", {}).values()))
    else:
        log = read_csv(found)
        points, clock, epochs = log.points, {}, log.epochs
        notes = [*notes, *log.notes]
    seconds = take_seconds(points, clock)
    columns = {name: Series.of(values) for name, values in points.items() if values}
    if not columns:
        raise ReportError(
            f"{found} has no values. Lightning logs every log_every_n_steps=50 steps and CSVLogger writes every "
            "flush_logs_every_n_steps=100, unless told otherwise: was the run too short, or has it only begun?"
        )
    run = Run.of(found, columns, epochs)
    run.seconds = seconds
    run.notes = [*notes, *_not_finite(found, columns)]
    return run


def _not_finite(path: Path, columns: Mapping[str, Series]) -> list[str]:
    """A note for each series that was NaN or infinite at some step."""
    notes = []
    for name, series in columns.items():
        steps = [step for step, value in zip(series.steps, series.values) if not math.isfinite(value)]
        if steps:
            notes.append(
                f"{path}: {name} was NaN or infinite at {len(steps)} logged step(s), the first at step {steps[0]}."
            )
    return notes


__all__ = ["read_run"]
