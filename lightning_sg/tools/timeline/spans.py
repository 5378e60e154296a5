"""Profiled actions and their times, and how a process's time divides into kinds of work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_sg.profiling import BATCH, EPOCH, KINDS, LIGHTNING, kind_of


@dataclass(frozen=True)
class Span:
    """One action that a profiler has seen.

    Attributes:
        name: The action's name in Lightning's profilers.
        start: When it began, in seconds.
        duration: How long it took, in seconds.
    """

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        """When it ended, in seconds."""
        return self.start + self.duration


@dataclass(frozen=True)
class Piece:
    """A stretch of time in which a process did one kind of work.

    Attributes:
        kind: The kind of work; see :func:`~lightning_sg.profiling.kind_of`.
        start: When it began, in seconds.
        end: When it ended, in seconds.
    """

    kind: str
    start: float
    end: float


def pieces_of(spans: Iterable[Span]) -> list[Piece]:
    """Divides the time of a process's training batches, including loading them, into kinds of work.

    Validation, and whatever else runs between batches, is left out.

    Args:
        spans: Spans of one process, nested or one after another, in any order. The innermost of nested spans decides.

    Returns:
        Pieces in the order of time, without overlaps.
    """
    pieces: list[Piece] = []
    for outermost, innermost, start, end in _stretches(span for span in spans if span.name != EPOCH):
        if outermost.name != BATCH and kind_of(outermost.name) != "data":
            continue
        kind = kind_of(innermost.name)
        if pieces and pieces[-1].kind == kind and pieces[-1].end == start:
            pieces[-1] = replace(pieces[-1], end=end)
        else:
            pieces.append(Piece(kind, start, end))
    return pieces


def _stretches(spans: Iterable[Span]) -> Iterator[tuple[Span, Span, float, float]]:
    """The stretches between starts and ends of spans: outermost open span, innermost open span, start and end."""
    running: list[Span] = []
    now = 0.0
    for time, started in _changes(spans):
        if running and time > now:
            yield running[0], running[-1], now, time
        now = time
        if started is None:
            running.pop()
        else:
            running.append(started)


def _changes(spans: Iterable[Span]) -> Iterator[tuple[float, Span | None]]:
    """Every start, with the span, and every end, with ``None``; an end closes the span that started last."""
    ends: list[float] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.duration)):
        while ends and ends[-1] <= span.start:
            yield ends.pop(), None
        yield span.start, span
        ends.append(span.end)
    while ends:
        yield ends.pop(), None


def shares_of(spans: Sequence[Span]) -> dict[str, float]:
    """The share of each kind of work in the time that :func:`pieces_of` divides; kinds without time are left out."""
    pieces = pieces_of(spans)
    whole = sum(piece.end - piece.start for piece in pieces)
    shares = {kind: sum(p.end - p.start for p in pieces if p.kind == kind) for kind in (*KINDS, LIGHTNING)}
    return {kind: share / whole for kind, share in shares.items() if share > 0}


def batches_of(spans: Iterable[Span]) -> list[Span]:
    """The training batches among the spans, in the order of time."""
    return sorted((span for span in spans if span.name == BATCH), key=lambda span: span.start)


__all__ = ["Piece", "Span", "batches_of", "pieces_of", "shares_of"]
