"""The timeline as a picture: a row for each process, a colour for each kind of work."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_sg.profiling import KINDS, LIGHTNING
from lightning_sg.tools.report.style import DPI, STYLE
from lightning_sg.tools.timeline.spans import Span, batches_of, pieces_of

_COLOURS = {
    "compute": "#0072b2",
    "predictor": "#009e73",
    "exact": "#56b4e9",
    "wait": "#f3c6b5",
    "send": "#d55e00",
    "ghosts": "#cc79a7",
    "start-up": "#000000",
    "data": "#e69f00",
    LIGHTNING: "#b8b8b8",
}
_LABELS = {
    "compute": "compute",
    "predictor": "predict and learn",
    "exact": "exact gradient",
    "wait": "wait",
    "send": "send",
    "ghosts": "run without data",
    "start-up": "start",
    "data": "load data",
    LIGHTNING: "Lightning",
}


def draw(stages: Mapping[str, Sequence[Span]], batches: int = 8) -> bytes:
    """Draws the last batches of the window.

    Args:
        stages: The spans of each process by its name, from the first stage to the last; some have a batch.
        batches: How many batches of the slowest process to show.

    Returns:
        A PNG image.
    """
    pieces = {name: pieces_of(spans) for name, spans in stages.items()}
    seen = [some for spans in stages.values() if (some := batches_of(spans)[-batches:])]
    first, last = min(some[0].start for some in seen), max(some[-1].end for some in seen)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.5 + 0.55 * len(stages)), layout="constrained")
        axes = figure.subplots()
        for row, each in enumerate(pieces.values()):
            for kind in (*KINDS, LIGHTNING):
                shown = [p for p in each if p.kind == kind and p.end > first and p.start < last]
                bars = [(1000 * (p.start - first), 1000 * (p.end - p.start)) for p in shown]
                axes.broken_barh(bars, (row - 0.38, 0.76), facecolors=_COLOURS[kind], linewidth=0)
        axes.set_yticks(range(len(pieces)), list(pieces))
        axes.set_ylim(len(pieces) - 0.5, -0.5)
        axes.set_xlim(0, 1000 * (last - first))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("milliseconds")
        axes.set_title("What each process does")
        used = {piece.kind for each in pieces.values() for piece in each}
        handles = [Patch(color=_COLOURS[kind], label=_LABELS[kind]) for kind in _COLOURS if kind in used]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
        image = io.BytesIO()
        figure.savefig(image, dpi=DPI, format="png")
    return image.getvalue()


__all__ = ["draw"]
