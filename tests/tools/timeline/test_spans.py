"""Spans: how they divide into kinds of work."""

from __future__ import annotations

import pytest

from lightning_sg import profiling
from lightning_sg.profiling import BATCH, EPOCH, LIGHTNING
from lightning_sg.tools.timeline.spans import Piece, Span, pieces_of, shares_of


def test_innermost_span_decides() -> None:
    spans = [
        Span("x.training_step", 1.0, 3.0),
        Span(BATCH, 0.0, 10.0),
        Span(profiling.PREDICT, 2.0, 1.0),
        Span("x.backward", 4.0, 2.0),
        Span(EPOCH, -1.0, 20.0),
        Span("x.validation_step", 10.0, 1.0),
        Span("x.train_dataloader_next", 11.5, 0.5),
        Span(BATCH, 12.0, 1.0),
    ]
    assert pieces_of(spans) == [
        Piece(LIGHTNING, 0.0, 1.0),
        Piece("compute", 1.0, 2.0),
        Piece("predictor", 2.0, 3.0),
        Piece("compute", 3.0, 6.0),
        Piece(LIGHTNING, 6.0, 10.0),
        Piece("data", 11.5, 12.0),
        Piece(LIGHTNING, 12.0, 13.0),
    ]
    shares = shares_of(spans)
    assert shares == pytest.approx(
        {"compute": 4 / 11.5, "predictor": 1 / 11.5, "data": 0.5 / 11.5, LIGHTNING: 6 / 11.5}
    )
    assert pieces_of([]) == []
    assert shares_of([]) == {}
