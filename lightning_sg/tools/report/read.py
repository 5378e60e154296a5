"""Reads what a run has logged: metrics.csv of Lightning's CSVLogger, or TensorBoard's event files."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_sg.errors import SyntheticGradientsError

METRICS = "metrics.csv"
_BOUNDARY_COLUMN = re.compile(r"sg/(?P<boundary>.+)/(?P<key>[^/]+)", re.DOTALL)


class ReportError(SyntheticGradientsError):
    """A report cannot be made: a run cannot be read, files cannot be written, or matplotlib is missing."""


@dataclass
class Series:
    """The values of one quantity at the steps where it was logged, in the order of the steps.

    Attributes:
        steps: The training steps.
        values: A value for each; infinite or NaN where that is what was logged.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, points: Mapping[int, float]) -> Series:
        """Makes a series from values by step."""
        steps = sorted(points)
        return cls(steps, [points[step] for step in steps])

    def finite(self) -> list[float]:
        """The values that are neither infinite nor NaN."""
        return [value for value in self.values if math.isfinite(value)]


@dataclass
class Run:
    """What one run has logged.

    Attributes:
        path: The file or folder that was read.
        metrics: Every quantity outside the boundaries, by name.
        boundaries: For each boundary, its quantities by key: ``cosine``, ``norm_ratio``...
        epochs: How many epochs have logged something, 0 if unknown.
        notes: What the reader of a report must know about the reading.
        label: A short name, unique among the runs of one report.
    """

    path: Path
    metrics: dict[str, Series]
    boundaries: dict[str, dict[str, Series]]
    epochs: int = 0
    notes: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def first_step(self) -> int:
        """The first step at which anything was logged."""
        return min(series.steps[0] for series in self.series().values())

    @property
    def last_step(self) -> int:
        """The last step at which anything was logged."""
        return max(series.steps[-1] for series in self.series().values())

    def series(self) -> dict[str, Series]:
        """Every series by the name of its column."""
        columns = {f"sg/{name}/{key}": series for name, by in self.boundaries.items() for key, series in by.items()}
        return {**self.metrics, **columns}

    def quantities(self) -> list[str]:
        """The keys that any boundary has, in the order of their first appearance."""
        return list(dict.fromkeys(key for by in self.boundaries.values() for key in by))


def read_run(path: str | Path) -> Run:
    """Reads a run.

    Args:
        path: A ``metrics.csv``, the folder that has it, a folder of ``version_*`` folders (the newest with figures is
            read, and a note says which), or a folder of TensorBoard's event files.

    Returns:
        What the run has logged.

    Raises:
        ReportError: If there is nothing there, or nothing that can be read.
    """
    path = Path(path)
    found, notes = _locate(path)
    if found.is_dir():
        from lightning_sg.tools.report.events import read_events

        points = read_events(found)
        epochs = len(set(points.pop("epoch", {}).values()))
    else:
        points, epochs, more = _read_csv(found)
        notes += more
    columns = {name: Series.of(values) for name, values in points.items() if values}
    if not columns:
        raise ReportError(
            f"{found} has no values. Lightning logs every log_every_n_steps=50 steps unless it is told otherwise, and "
            "CSVLogger writes every flush_logs_every_n_steps=100: was the run too short, or has it only begun?"
        )
    run = _sort(found, columns, epochs)
    run.notes = [*notes, *_not_finite(found, columns)]
    return run


def label(runs: Sequence[Run]) -> None:
    """Gives each run a short label that no other has: the last parts of its path.

    Args:
        runs: The runs of one report.
    """
    # A file of any other name stands for itself: several may lie in one folder.
    places = [(run.folder if run.path.name == METRICS else run.path).absolute() for run in runs]
    for depth in range(1, max(len(place.parts) for place in places) + 1):
        labels = ["/".join(place.parts[-depth:]) for place in places]
        bare = depth == 1 and any(_version(place) is not None for place in places)  # "version_0" says little
        if not bare and len(set(labels)) == len(labels):
            break
    seen: dict[str, int] = {}
    for run, name in zip(runs, labels):
        seen[name] = seen.get(name, 0) + 1
        run.label = name if seen[name] == 1 else f"{name} ({seen[name]})"


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that counts ``net.10`` after ``net.2``."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part[:1].isdecimal() else (1, 0, part) for part in parts if part]


# ---------------------------------------------------------------------- which file


def _locate(path: Path) -> tuple[Path, list[str]]:
    """The metrics.csv, or the folder with event files, that ``path`` means; and notes about the choice."""
    if path.is_file():
        return (path.parent if "tfevents" in path.name else path), []
    if not path.exists():
        raise ReportError(
            f"{path} does not exist. Give the folder of a run's {METRICS}, such as outputs/mnist/version_0."
        )
    if found := _figures(path):
        return found, []
    versions = sorted((each for each in path.iterdir() if _version(each) is not None), key=_version_of, reverse=True)
    for place, version in enumerate(versions):
        if found := _figures(version):
            notes = [f"{path} has {len(versions)} versions; the newest one, {version.name}, is shown."]
            if place:
                notes = [f"{path}: {version.name} is shown; {_names(versions[:place])} has nothing logged."]
            return found, notes if len(versions) > 1 else []
    below = sorted((each.parent for deep in ("*/", "*/*/") for each in path.glob(deep + METRICS)), key=str)
    hint = f" There are runs below it: {_names(below)}." if below else ""
    raise ReportError(
        f"{path} has no {METRICS}.{hint} Give the folder of a run that was trained with "
        "Trainer(logger=CSVLogger(...)), such as outputs/mnist/version_0."
    )


def _figures(folder: Path) -> Path | None:
    if (folder / METRICS).is_file():
        return folder / METRICS
    return folder if next(folder.glob("*tfevents*"), None) else None


def _version(folder: Path) -> int | None:
    matched = re.fullmatch(r"version_([0-9]+)", folder.name)
    return int(matched[1]) if matched and folder.is_dir() else None


def _version_of(folder: Path) -> int:
    return _version(folder) or 0


def _names(paths: Sequence[Path], most: int = 5) -> str:
    rest = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(str(path) for path in paths[:most]) + rest


# ---------------------------------------------------------------------- a metrics.csv

Points = dict[str, dict[int, float]]


def _read_csv(path: Path) -> tuple[Points, int, list[str]]:
    """Values by column and step, the number of epochs, and notes about what was left out."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not a text file: it is damaged, or no {METRICS} of a CSVLogger.") from error
    except (OSError, csv.Error) as error:
        raise ReportError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise ReportError(f"{path} is empty. Has the run logged anything yet?")
    header, *rows = rows
    if "step" not in header:
        raise ReportError(f"{path} has no column 'step': is it the {METRICS} of Lightning's CSVLogger?")
    whole = [row for row in rows if len(row) == len(header)]
    missing_is_nan = _missing_is_nan(header, whole)
    points: Points = {name: {} for name in header if name not in ("step", "epoch", "")}
    epochs: set[str] = set()
    wrong = 0
    damaged = len(rows) - len(whole)
    for row in whole:
        cells = dict(zip(header, row))
        step = _number(cells.pop("step"))
        if step is None or not math.isfinite(step):
            damaged += 1
            continue
        epochs.add(cells.pop("epoch", ""))
        for name, cell in cells.items():
            if not cell.strip() or not name:
                continue
            value = _number(cell)
            if value is None:
                wrong += 1
            elif not (missing_is_nan and math.isnan(value)):
                # A run that was resumed repeats steps: the later row counts.
                points[name][int(step)] = value
    notes = []
    if damaged:
        notes.append(f"{path}: {damaged} damaged row(s) left out; they have no step, or too few or too many cells.")
    if wrong:
        notes.append(f"{path}: {wrong} cell(s) that are no numbers left out.")
    return points, len(epochs - {""}), notes


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _missing_is_nan(header: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """Whether NaN stands for "not logged": so write other programs, but CSVLogger leaves such cells empty.

    Where cells are empty, a NaN was logged: a run that has diverged.
    """
    return len(set(header) - {"step", "epoch"}) > 1 and all(cell.strip() for row in rows for cell in row)


# ---------------------------------------------------------------------- what was found


def _sort(path: Path, columns: Mapping[str, Series], epochs: int) -> Run:
    """Tells the boundaries' columns from the others."""
    metrics: dict[str, Series] = {}
    boundaries: dict[str, dict[str, Series]] = {}
    for name, series in columns.items():
        if matched := _BOUNDARY_COLUMN.fullmatch(name):
            boundaries.setdefault(matched["boundary"], {})[matched["key"]] = series
        else:
            metrics[name] = series
    # CSVLogger sorts its columns, so the order in the network is lost; that of the names is the best guess.
    return Run(path, metrics, {name: boundaries[name] for name in sorted(boundaries, key=natural)}, epochs)


def _not_finite(path: Path, columns: Mapping[str, Series]) -> list[str]:
    notes = []
    for name, series in columns.items():
        steps = [step for step, value in zip(series.steps, series.values) if not math.isfinite(value)]
        if steps:
            notes.append(
                f"{path}: {name} was NaN or infinite at {len(steps)} logged step(s), the first at step {steps[0]}."
            )
    return notes
