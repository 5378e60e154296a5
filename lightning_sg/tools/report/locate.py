"""Finds the log that a path means: a metrics.csv, a log of Weights & Biases, or a folder of TensorBoard's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_sg.tools.report.run import METRICS, ReportError, version_of
from lightning_sg.tools.report.wandb_log import log_in


def locate(path: Path) -> tuple[Path, list[str]]:
    """Finds the log of a run.

    Args:
        path: A log file, a folder with one, or a folder of ``version_*`` folders; of those, the newest that has
            logged something is taken.

    Returns:
        The CSV file, the file of Weights & Biases or the folder of event files, and notes on the choice.

    Raises:
        ReportError: If there is no log.
    """
    if path.is_file():
        return (path.parent if "tfevents" in path.name else path), []
    if not path.exists():
        raise ReportError(
            f"{path} does not exist. Give the folder of a run's {METRICS}, such as outputs/mnist/version_0."
        )
    if found := _log_in(path):
        return found, []
    versions = _versions(path)
    for place, version in enumerate(versions):
        if found := _log_in(version):
            return found, _choice(path, versions, place)
    if found := log_in(path):
        return found, []
    raise ReportError(
        f"{path} has no {METRICS}.{_hint(path)} Give the folder of a run that was trained with "
        "Trainer(logger=CSVLogger(...)), such as outputs/mnist/version_0."
    )


def _log_in(folder: Path) -> Path | None:
    if (folder / METRICS).is_file():
        return folder / METRICS
    return folder if next(folder.glob("*tfevents*"), None) else None


def _versions(folder: Path) -> list[Path]:
    """The ``version_*`` folders, newest first."""
    numbered = [(number, each) for each in folder.iterdir() if (number := version_of(each)) is not None]
    return [each for _, each in sorted(numbered, reverse=True)]


def _choice(path: Path, versions: Sequence[Path], place: int) -> list[str]:
    """A note on which of several versions was taken."""
    name = versions[place].name
    if place:
        return [f"{path}: {name} is shown; {_names(versions[:place])} has nothing logged."]
    return [f"{path} has {len(versions)} versions; the newest one, {name}, is shown."] if len(versions) > 1 else []


def _hint(path: Path) -> str:
    """Names the runs one or two folders down, if there are any."""
    below = sorted((each.parent for deep in ("*/", "*/*/") for each in path.glob(deep + METRICS)), key=str)
    return f" There are runs below it: {_names(below)}." if below else ""


def _names(paths: Sequence[Path], most: int = 5) -> str:
    rest = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(str(path) for path in paths[:most]) + rest


__all__ = ["locate"]
