"""What a run has logged, as figures and a page: ``python -m lightning_sg report RUN``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_sg.tools.report.compare import Figure, Row, boundary_figures, compare, remarks
from lightning_sg.tools.report.page import PAGE, page
from lightning_sg.tools.report.read import ReportError, Run, Series, label, read_run


@dataclass
class Report:
    """A report that was written.

    Attributes:
        run: What was read of the run.
        baselines: What was read of its baselines.
        rows: The final values, compared.
        boundaries: The figures of each boundary, by key.
        notes: What a reader must know.
        paths: The files, the page first.
    """

    run: Run
    baselines: list[Run]
    rows: list[Row]
    boundaries: dict[str, dict[str, Figure]]
    notes: list[str]
    paths: list[Path]


def report(
    run: str | Path, baselines: Sequence[str | Path] = (), out: str | Path | None = None, title: str | None = None
) -> Report:
    """Draws a run's metrics and the alignment at its boundaries, and writes PNG files and an HTML page with them.

    Args:
        run: A ``metrics.csv`` of Lightning's CSVLogger, its folder, or a folder of ``version_*`` folders; or a folder
            of TensorBoard's event files.
        baselines: Runs to compare with, such as plain backpropagation from the same seed.
        out: The folder to write to; by default ``report`` in the run's folder.
        title: The page's title; by default the run's name.

    Returns:
        What was read, computed and written.

    Raises:
        ReportError: If matplotlib is missing, a run cannot be read, or the files cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError('A report needs matplotlib: pip install "lightning-sg[report]"')
    from lightning_sg.tools.report.draw import draw

    read = [read_run(path) for path in (run, *baselines)]
    label(read)
    first, others = read[0], read[1:]
    rows, boundaries, notes = compare(first, others), boundary_figures(first), remarks(first, others)
    pictures = draw(first, others)
    folder = first.folder / "report" if out is None else Path(out)
    files = {PAGE: page(first, others, rows, boundaries, notes, pictures, title).encode()}
    files |= {f"{picture.name}.png": picture.png for picture in pictures}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise ReportError(
            f"The report cannot be written to {folder}: {error}. Give another folder with --out."
        ) from error
    return Report(first, others, rows, boundaries, notes, [folder / name for name in files])


__all__ = ["Figure", "Report", "ReportError", "Row", "Run", "Series", "read_run", "report"]
