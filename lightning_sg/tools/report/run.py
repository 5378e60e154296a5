"""What one run has logged: its series, sorted into metrics and boundaries, and a short label."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_sg.errors import SyntheticGradientsError

METRICS = "metrics.csv"
_BOUNDARY_COLUMN = re.compile(r"sg/(?P<boundary>.+)/(?P<key>[^/]+)", re.DOTALL)


class ReportError(SyntheticGradientsError):
    """A report cannot be made: a run cannot be read, files cannot be written, or matplotlib is missing."""


@dataclass
class Series:
    """The logged values of one quantity, in the order of their steps.

    Attributes:
        steps: The training steps at which it was logged, or the seconds at which it was.
        values: One value for each step, infinite or NaN if that is what was logged.
    """

    steps: Sequence[float] = field(default_factory=list)
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
    """Everything that one run has logged.

    Attributes:
        path: The file or folder that was read.
        metrics: Every series that does not belong to a boundary, by name.
        boundaries: For each boundary, its series by key: ``cosine``, ``norm_ratio``, ...
        epochs: The number of epochs that logged something, 0 if unknown.
        seconds: Seconds since training began, by step; empty if the log does not say.
        notes: What the reader of a report must know about how the run was read.
        label: A short name, unique among the runs of one report.
    """

    path: Path
    metrics: dict[str, Series]
    boundaries: dict[str, dict[str, Series]]
    epochs: int = 0
    seconds: Series = field(default_factory=Series)
    notes: list[str] = field(default_factory=list)
    label: str = ""

    @classmethod
    def of(cls, path: Path, columns: Mapping[str, Series], epochs: int) -> Run:
        """Makes a run from columns, of which ``sg/<boundary>/<key>`` belong to boundaries.

        Boundaries are sorted by name: CSVLogger sorts its columns, so their order in the network is lost.
        """
        metrics: dict[str, Series] = {}
        boundaries: dict[str, dict[str, Series]] = {}
        for name, series in columns.items():
            if matched := _BOUNDARY_COLUMN.fullmatch(name):
                boundaries.setdefault(matched["boundary"], {})[matched["key"]] = series
            else:
                metrics[name] = series
        return cls(path, metrics, {name: boundaries[name] for name in sorted(boundaries, key=natural)}, epochs)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def first_step(self) -> int:
        """The first step at which anything was logged."""
        return int(min(series.steps[0] for series in self.series().values()))

    @property
    def last_step(self) -> int:
        """The last step at which anything was logged."""
        return int(max(series.steps[-1] for series in self.series().values()))

    def series(self) -> dict[str, Series]:
        """Every series by the name of its column."""
        columns = {f"sg/{name}/{key}": series for name, by in self.boundaries.items() for key, series in by.items()}
        return {**self.metrics, **columns}

    def quantities(self) -> list[str]:
        """The keys that any boundary has, in the order of their first appearance."""
        return list(dict.fromkeys(key for by in self.boundaries.values() for key in by))


def label(runs: Sequence[Run]) -> None:
    """Labels each run with as few trailing parts of its path as make all labels different.

    Args:
        runs: The runs of one report.
    """
    # A file that is not called metrics.csv names its run; several may be in one folder. One of Weights & Biases has a
    # folder of its own.
    places = [(run.folder if run.path.name == METRICS or _is_wandb(run.path) else run.path).absolute() for run in runs]
    versions = any(version_of(place) is not None for place in places)
    for depth in range(1, max(len(place.parts) for place in places) + 1):
        labels = ["/".join(place.parts[-depth:]) for place in places]
        bare = depth == 1 and versions  # "version_0" alone says little
        if not bare and len(set(labels)) == len(labels):
            break
    seen: dict[str, int] = {}
    for run, name in zip(runs, labels):
        seen[name] = seen.get(name, 0) + 1
        run.label = name if seen[name] == 1 else f"{name} ({seen[name]})"


def _is_wandb(path: Path) -> bool:
    return path.suffix == ".wandb" and "run-" in path.parent.name


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts ``net.10`` after ``net.2``."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part[:1].isdecimal() else (1, 0, part) for part in parts if part]


def version_of(folder: Path) -> int | None:
    """The number in the name of a ``version_*`` folder; ``None`` for anything else."""
    matched = re.fullmatch(r"version_([0-9]+)", folder.name)
    return int(matched[1]) if matched and folder.is_dir() else None


__all__ = ["METRICS", "ReportError", "Run", "Series", "label", "natural", "version_of"]
