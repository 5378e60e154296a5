"""Reads and writes spans in the Chrome trace format, which chrome://tracing and Perfetto show."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.profiling import kind_of
from lightning_sg.tools.timeline.spans import Span

Event = dict[str, Any]


def events_of(spans: Iterable[Span], process: int, name: str | None = None) -> list[Event]:
    """The trace events of one process.

    Args:
        spans: Its spans.
        process: Its number.
        name: Its name in the viewer; by default the viewer shows the number.

    Returns:
        The events, times in microseconds.
    """
    events: list[Event] = []
    if name is not None:
        events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}})
    return events + [_event(span, process) for span in spans]


def _event(span: Span, process: int) -> Event:
    times = {"ts": round(1e6 * span.start, 3), "dur": round(1e6 * span.duration, 3)}
    return {"name": span.name, "cat": kind_of(span.name), "ph": "X", "pid": process, "tid": 0, **times}


def trace_text(events: list[Event]) -> str:
    """The contents of a trace file with these events."""
    return json.dumps({"traceEvents": events})


def read_spans(path: Path) -> dict[int, list[Span]]:
    """Reads a trace file.

    Args:
        path: The file.

    Returns:
        The spans of each process, by its number.

    Raises:
        SyntheticGradientsError: If the file is not a trace.
    """
    found: dict[int, list[Span]] = {}
    try:
        for event in json.loads(path.read_text())["traceEvents"]:
            if event["ph"] == "X":
                span = Span(event["name"], 1e-6 * event["ts"], 1e-6 * event["dur"])
                found.setdefault(int(event["pid"]), []).append(span)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SyntheticGradientsError(f"{path} is not a trace in the Chrome format ({error!r}).") from error
    return found


__all__ = ["Event", "events_of", "read_spans", "trace_text"]
