"""Draws the pictures of a report."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import matplotlib

from lightning_sg.tools.report.draw.alignment import draw_alignment
from lightning_sg.tools.report.draw.boundaries import draw_boundaries
from lightning_sg.tools.report.draw.guard import draw_guard
from lightning_sg.tools.report.draw.metrics import draw_metrics
from lightning_sg.tools.report.draw.time import draw_time
from lightning_sg.tools.report.picture import Picture
from lightning_sg.tools.report.run import Run
from lightning_sg.tools.style import STYLE


def draw(run: Run, baselines: Sequence[Run] = ()) -> list[Picture]:
    """Draws every picture for which something was logged.

    Args:
        run: The run.
        baselines: Runs to compare it with; only their metrics are drawn.

    Returns:
        The pictures, from the general to the particular: metrics, the same over seconds, alignment over
        steps, boundaries side by side, guard.
    """
    # Without pyplot, whose figures would stay open and mix with those of the user's program.
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # matplotlib draws a box instead
        runs = [run, *baselines]
        pictures = [draw_metrics(runs), draw_time(runs), draw_alignment(run), draw_boundaries(run), draw_guard(run)]
    return [picture for picture in pictures if picture is not None]


__all__ = ["draw"]
