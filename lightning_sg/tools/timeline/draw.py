"""The timeline as a picture: a row for each process, a colour for each kind of work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_sg.profiling import LIGHTNING
from lightning_sg.tools.style import PALETTE, STYLE, png
from lightning_sg.tools.timeline.spans import Piece, Span, batches_of, pieces_of

# The colour and the label of each kind of work, in the order of the legend. Waiting is pale: nothing happens then.
_KINDS = {
    "compute": (PALETTE[0], "compute"),
    "predictor": (PALETTE[2], "predict and learn"),
    "exact": (PALETTE[4], "exact gradient"),
    "wait": ("#f3c6b5", "wait"),
    "send": (PALETTE[1], "send"),
    "fake tensors": (PALETTE[3], "run on fake tensors"),
    "start-up": ("#000000", "start-up"),
    "data": (PALETTE[5], "load data"),
    LIGHTNING: ("#b8b8b8", "Lightning"),
}


def draw(stages: Mapping[str, Sequence[Span]], batches: int = 8) -> bytes:
    """Draws the last batches that were recorded.

    Args:
        stages: The spans of each process by its name, from the first stage to the last; at least one has a batch.
        batches: How many batches of the slowest process to show.

    Returns:
        A PNG image.
    """
    pieces = {name: pieces_of(spans) for name, spans in stages.items()}
    window = _window(stages.values(), batches)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.5 + 0.55 * len(pieces)), layout="constrained")
        axes = figure.subplots()
        for row, each in enumerate(pieces.values()):
            _draw_row(axes, row, each, window)
        _finish(axes, list(pieces), window)
        _legend(figure, {piece.kind for each in pieces.values() for piece in each})
        return png(figure)


def _window(stages: Iterable[Sequence[Span]], batches: int) -> tuple[float, float]:
    """The beginning and the end of the time to show: the last batches of every process."""
    last = [seen for spans in stages if (seen := batches_of(spans)[-batches:])]
    return min(seen[0].start for seen in last), max(seen[-1].end for seen in last)


def _draw_row(axes: Axes, row: int, pieces: Iterable[Piece], window: tuple[float, float]) -> None:
    first, last = window
    shown = [piece for piece in pieces if piece.end > first and piece.start < last]
    for kind, (colour, _) in _KINDS.items():
        bars = [(1000 * (p.start - first), 1000 * (p.end - p.start)) for p in shown if p.kind == kind]
        axes.broken_barh(bars, (row - 0.38, 0.76), facecolors=colour, linewidth=0)


def _finish(axes: Axes, names: Sequence[str], window: tuple[float, float]) -> None:
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first stage on top
    axes.set_xlim(0, 1000 * (window[1] - window[0]))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("milliseconds")
    axes.set_title("What each process does")


def _legend(figure: Figure, used: set[str]) -> None:
    handles = [Patch(color=colour, label=label) for kind, (colour, label) in _KINDS.items() if kind in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)


__all__ = ["draw"]
