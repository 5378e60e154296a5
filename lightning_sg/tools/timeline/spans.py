"""Actions with their times: read from trace files, and divided into kinds of work."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.profiling import BATCH, EPOCH, KINDS, LIGHTNING, kind_of


@dataclass(frozen=True)
class Span:
    """One action.

    Attributes:
        name: The name that Lightning's profilers see.
        start: When it began, in seconds.
        duration: In seconds.
    """

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        """When it ended, in seconds."""
        return self.start + self.duration

    def event(self, process: int) -> dict[str, Any]:
        """The span in the Chrome trace format, in microseconds."""
        times = {"ts": round(1e6 * self.start, 3), "dur": round(1e6 * self.duration, 3)}
        return {"name": self.name, "cat": kind_of(self.name), "ph": "X", "pid": process, "tid": 0, **times}


@dataclass(frozen=True)
class Piece:
    """A stretch of time in which one kind of work was done, as :attr:`Span` counts time."""

    kind: str
    start: float
    end: float


def pieces_of(spans: Iterable[Span]) -> list[Piece]:
    """What a process did from moment to moment in its training batches, loading them included.

    Args:
        spans: Of one process, nested or one after the other, in any order. Of nested ones, the innermost counts;
            validation and what else is between batches does not.

    Returns:
        Pieces in the order of time, none of which overlap.
    """
    ordered = sorted((span for span in spans if span.name != EPOCH), key=lambda span: (span.start, -span.duration))
    pieces: list[Piece] = []
    inside: list[Span] = []
    at = 0.0

    def until(time: float) -> None:
        """The innermost span goes on until ``time``."""
        nonlocal at
        counts = inside and (inside[0].name == BATCH or kind_of(inside[0].name) == "data")
        if counts and time > at:
            kind = kind_of(inside[-1].name)
            if pieces and pieces[-1].kind == kind and pieces[-1].end == at:
                pieces[-1] = Piece(kind, pieces[-1].start, time)
            else:
                pieces.append(Piece(kind, at, time))
        at = time

    for span in ordered:
        while inside and inside[-1].end <= span.start:
            until(inside[-1].end)
            inside.pop()
        until(span.start)
        inside.append(span)
    while inside:
        until(inside[-1].end)
        inside.pop()
    return pieces


def shares_of(spans: Sequence[Span]) -> dict[str, float]:
    """The share of each kind of work in a process's time, those without any left out; see :func:`pieces_of`."""
    pieces = pieces_of(spans)
    whole = sum(piece.end - piece.start for piece in pieces)
    shares = {kind: sum(p.end - p.start for p in pieces if p.kind == kind) for kind in (*KINDS, LIGHTNING)}
    return {kind: share / whole for kind, share in shares.items() if share > 0}


def batches_of(spans: Iterable[Span]) -> list[Span]:
    """The training batches among the spans, in the order of time."""
    return sorted((span for span in spans if span.name == BATCH), key=lambda span: span.start)


def read_spans(path: Path) -> dict[int, list[Span]]:
    """Reads the spans of a trace file, by process.

    Raises:
        SyntheticGradientsError: If it is no such file.
    """
    try:
        events = json.loads(path.read_text())["traceEvents"]
        found: dict[int, list[Span]] = {}
        for event in events:
            if event["ph"] == "X":
                span = Span(event["name"], 1e-6 * event["ts"], 1e-6 * event["dur"])
                found.setdefault(int(event["pid"]), []).append(span)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SyntheticGradientsError(f"{path} is not a trace in the Chrome format ({error!r}).") from error
    return found


__all__ = ["Piece", "Span", "batches_of", "pieces_of", "read_spans", "shares_of"]
