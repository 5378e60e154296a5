"""Reads the metrics.csv of Lightning's CSVLogger, as far as it is intact."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_sg.tools.report.run import METRICS, ReportError


@dataclass
class CsvLog:
    """The contents of one metrics.csv.

    Attributes:
        points: Values by column and step.
        epochs: The number of epochs that logged something.
        notes: What was left out.
    """

    points: dict[str, dict[int, float]]
    epochs: int = 0
    notes: list[str] = field(default_factory=list)


def read_csv(path: Path) -> CsvLog:
    """Reads a metrics.csv; leaves damaged rows and cells out, and notes how many.

    Args:
        path: The file.

    Raises:
        ReportError: If the file cannot be read, is empty, or has no column ``step``.
    """
    header, rows = _table(path)
    whole = [row for row in rows if len(row) == len(header)]
    nan_is_missing = _nan_is_missing(header, whole)
    log = CsvLog({name: {} for name in header if name not in ("step", "epoch", "")})
    epochs: set[str] = set()
    wrong, damaged = 0, len(rows) - len(whole)
    for row in whole:
        cells = dict(zip(header, row))
        step = _number(cells.pop("step"))
        if step is None or not math.isfinite(step):
            damaged += 1
            continue
        epochs.add(cells.pop("epoch", ""))
        values = {name: _number(cell) for name, cell in cells.items() if name and cell.strip()}
        wrong += sum(value is None for value in values.values())
        for name, value in values.items():
            # A resumed run repeats steps: the later row wins.
            if value is not None and not (nan_is_missing and math.isnan(value)):
                log.points[name][int(step)] = value
    log.epochs = len(epochs - {""})
    log.notes = _omissions(path, damaged, wrong)
    return log


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows that are not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not a text file: it is damaged, or not a {METRICS} of CSVLogger.") from error
    except (OSError, csv.Error) as error:
        raise ReportError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise ReportError(f"{path} is empty. Has the run logged anything yet?")
    if "step" not in rows[0]:
        raise ReportError(f"{path} has no column 'step': is it the {METRICS} of Lightning's CSVLogger?")
    return rows[0], rows[1:]


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _nan_is_missing(header: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """Whether NaN means "not logged", as in files that other programs write.

    CSVLogger leaves such cells empty. So where some cells are empty, a NaN was logged: the run has diverged.
    """
    return len(set(header) - {"step", "epoch"}) > 1 and all(cell.strip() for row in rows for cell in row)


def _omissions(path: Path, damaged: int, wrong: int) -> list[str]:
    notes = []
    if damaged:
        notes.append(f"{path}: {damaged} damaged row(s) left out; they have no step, or too few or too many cells.")
    if wrong:
        notes.append(f"{path}: {wrong} cell(s) left out that are not numbers.")
    return notes


__all__ = ["CsvLog", "read_csv"]
