"""Reports what a run has logged, as pictures and a page: ``python -m lightning_sg report RUN``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_sg.files import write_atomically
from lightning_sg.tools.report.compare import BoundaryMetric, Row, boundary_metrics, compare, remarks
from lightning_sg.tools.report.page import PAGE, page
from lightning_sg.tools.report.read import read_run
from lightning_sg.tools.report.run import ReportError, Run, Series, label


@dataclass
class Report:
    """A report that was written.

    Attributes:
        run: The run, as it was read.
        baselines: Its baselines, as they were read.
        rows: Their final values.
        boundaries: The metrics of each boundary, by key.
        notes: What a reader must know.
        paths: The files that were written, the page first.
    """

    run: Run
    baselines: list[Run]
    rows: list[Row]
    boundaries: dict[str, dict[str, BoundaryMetric]]
    notes: list[str]
    paths: list[Path]


def report(
    run: str | Path, baselines: Sequence[str | Path] = (), out: str | Path | None = None, title: str | None = None
) -> Report:
    """Draws a run's metrics and the alignment at its boundaries; writes PNG files and an HTML page.

    Args:
        run: A ``metrics.csv`` of Lightning's CSVLogger, its folder, a folder of ``version_*`` folders, or a folder of
            TensorBoard's event files.
        baselines: Runs to compare with, such as plain backpropagation from the same seed.
        out: The folder to write to; by default ``report`` in the run's folder.
        title: The page's title; by default it names the run.

    Returns:
        The report: everything that was read, computed and written.

    Raises:
        ReportError: If matplotlib is missing, a run cannot be read, or the files cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError('A report needs matplotlib: pip install "lightning-sg[report]"')
    from lightning_sg.tools.report.draw import draw

    runs = [read_run(path) for path in (run, *baselines)]
    label(runs)
    first, others = runs[0], runs[1:]
    rows, boundaries, notes = compare(first, others), boundary_metrics(first), remarks(first, others)
    pictures = draw(first, others)
    files = {PAGE: page(first, others, rows, boundaries, notes, pictures, title).encode()}
    files |= {f"{picture.name}.png": picture.png for picture in pictures}
    paths = _write(first.folder / "report" if out is None else Path(out), files)
    return Report(first, others, rows, boundaries, notes, paths)


def _write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Writes files by name into a folder, which it makes if need be; returns their paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with write_atomically(folder / name) as file:
                file.write(content)
    except OSError as error:
        raise ReportError(
            f"The report cannot be written to {folder}: {error}. Give another folder with --out."
        ) from error
    return [folder / name for name in files]


__all__ = ["BoundaryMetric", "Report", "ReportError", "Row", "Run", "Series", "read_run", "report"]
