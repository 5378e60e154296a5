"""The picture of :mod:`benchmarks.schedules`: a row for each device, a colour for each batch."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_sg.tools.timeline.spans import Piece, Span, batches_of, pieces_of

BATCHES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")


@dataclass(frozen=True)
class Look:
    """The colours of a page.

    Attributes:
        text: Of titles and labels.
        idle: Of a device that waits.
        predictor: Of predicting and learning.
    """

    text: str
    idle: str
    predictor: str


LOOKS = {"light": Look("#1f2328", "#ebedf0", "#1f2328"), "dark": Look("#e6edf3", "#2b3138", "#e6edf3")}


def window(processes: Sequence[Sequence[Span]], shown: int) -> tuple[float, float]:
    """From when the first of the last ``shown`` batches begins on the first device to when the last one ends."""
    last = [batches_of(spans)[-shown:] for spans in processes]
    return last[0][0].start, max(each[-1].end for each in last)


def in_batches(spans: Sequence[Span], shown: int) -> list[tuple[int, Piece]]:
    """The pieces of a process's last batches, each with the number of its batch, from 0."""
    return [
        (number, piece)
        for number, batch in enumerate(batches_of(spans)[-shown:])
        for piece in pieces_of(spans)
        if batch.start <= piece.start < batch.end
    ]


def draw(runs: Mapping[str, Sequence[Sequence[Span]]], titles: Mapping[str, str], shown: int, look: Look) -> bytes:
    """Draws all runs on one time axis.

    Args:
        runs: The spans of each process, first stage first, by the name of the run.
        titles: What to write above each run.
        shown: How many batches to show, at most as many as there are colours.
        look: The colours.

    Returns:
        An SVG image with a transparent background.
    """
    longest = max(end - start for start, end in (window(processes, shown) for processes in runs.values()))
    style = {"font.size": 10, "svg.hashsalt": "schedules", "svg.fonttype": "path"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.2, 0.5 + 1.12 * len(runs)), layout="constrained")
        rows = figure.subplots(len(runs), sharex=True, squeeze=False)[:, 0]
        for axes, (name, processes) in zip(rows, runs.items()):
            _draw_run(axes, processes, shown, look, longest)
            axes.set_title(titles[name], loc="left", fontsize=10.5, fontweight="bold", color=look.text, pad=4)
        rows[-1].tick_params(axis="x", length=3, labelbottom=True)
        rows[-1].set_xlabel("milliseconds", color=look.text)
        handles = [Patch(color=colour, label=f"batch {place + 1}") for place, colour in enumerate(BATCHES[:shown])]
        handles += [Patch(color=look.predictor, label="predict and learn"), Patch(color=look.idle, label="idle")]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, labelcolor=look.text
        )
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _draw_run(axes: Axes, processes: Sequence[Sequence[Span]], shown: int, look: Look, longest: float) -> None:
    start, end = window(processes, shown)
    for row, spans in enumerate(processes):
        axes.broken_barh([(0, 1000 * (end - start))], (row - 0.4, 0.8), facecolors=look.idle, linewidth=0)
        for number, piece in in_batches(spans, shown):
            colour = {"compute": BATCHES[number], "predictor": look.predictor}.get(piece.kind)
            if colour is not None:
                bar = (1000 * (piece.start - start), 1000 * (piece.end - piece.start))
                axes.broken_barh([bar], (row - 0.4, 0.8), facecolors=colour, linewidth=0)
    axes.set_yticks(range(len(processes)), [f"device {row}" for row in range(len(processes))])
    axes.set_ylim(len(processes) - 0.5, -0.5)
    axes.set_xlim(0, 1000 * longest)
    axes.tick_params(colors=look.text, length=0, labelbottom=False)
    axes.spines[:].set_visible(False)


__all__ = ["BATCHES", "LOOKS", "Look", "draw", "in_batches", "window"]
