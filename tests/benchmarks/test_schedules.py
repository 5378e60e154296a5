"""The picture of the schedules: which pieces belong to which batch, and that it is drawn in both looks."""

from __future__ import annotations

from benchmarks.schedules import TITLES
from benchmarks.schedules_figure import LOOKS, draw, in_batches, window
from lightning_sg.profiling import BATCH, PREDICT, WAIT_TARGET
from lightning_sg.tools.timeline.spans import Span


def process(offset: float) -> list[Span]:
    """Three batches of a second: half a second of computing, a tenth of predicting, the rest waiting."""
    spans = []
    for start in (offset, offset + 1, offset + 2):
        spans += [Span(BATCH, start, 1), Span(".training_step", start, 0.5)]
        spans += [Span(PREDICT, start + 0.5, 0.1), Span(WAIT_TARGET, start + 0.6, 0.4)]
    return spans


def test_only_the_last_batches_are_shown() -> None:
    assert window([process(0), process(0.5)], 2) == (1, 3.5)
    pieces = in_batches(process(0), 2)
    assert [(number, piece.kind, round(piece.start, 3)) for number, piece in pieces] == [
        *((0, "compute", 1), (0, "predictor", 1.5), (0, "wait", 1.6)),
        *((1, "compute", 2), (1, "predictor", 2.5), (1, "wait", 2.6)),
    ]


def test_pictures_are_drawn_for_light_and_dark_pages() -> None:
    runs = {name: [process(0), process(0.5)] for name in TITLES}
    drawn = {name: draw(runs, TITLES, 2, look).decode() for name, look in LOOKS.items()}
    for name, text in drawn.items():
        assert text.count("<svg") == 1
        assert LOOKS[name].text in text
        assert LOOKS[name].idle in text
    assert drawn["light"] != drawn["dark"]
