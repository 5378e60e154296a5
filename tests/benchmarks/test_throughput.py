"""Throughput: the tables, the figure and the rows of the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.contestants import COPIES, ONE, OURS, contestants
from benchmarks.throughput import chosen, conditions, together
from benchmarks.throughput_figure import best, draw, kind_of
from benchmarks.throughput_tables import ratio, tables
from benchmarks.workloads import WORKLOADS


def record(row: str, speeds: dict[str, list[float]], **others: Any) -> dict[str, Any]:
    turns = [
        {"contestant": name, "round": place, "speed": value, "paces": [{"steps": 1, "seconds": 2.0, "worked": 1.0}]}
        for name, values in speeds.items()
        for place, value in enumerate(values)
    ]
    return {"row": row, "workload": "w", "title": "a model", "stages": 2, "turns": turns, "inspected": [], **others}


SPEEDS = {
    ONE: [1.0, 2.0, 4.0],
    COPIES: [2.0, 4.0, 8.0],
    "1F1B, M=4": [1.0, 3.0, 4.0],
    "1F1B, M=8": [1.0, 2.0, 4.0],
    OURS: [1.8, 3.6, 8.0],
}


def test_ratios_are_of_turns_in_the_same_round() -> None:
    assert ratio(SPEEDS, OURS, ONE) == pytest.approx(1.8)
    assert ratio(SPEEDS, OURS, "DDP") is None
    text = tables([record("a", SPEEDS)])
    assert "| lightning_sg | 4 (2-8) | 1.80 | 0.90 | 50% |" in text
    assert "2 processes, 3 rounds" in text


def test_over_links_each_is_compared_with_itself_too() -> None:
    fast = record("f-rate", SPEEDS, megabits=None, latency_ms=0)
    slow = record("f-rate", {**SPEEDS, OURS: [0.9, 1.8, 4.0]}, megabits=50, latency_ms=0)
    text = tables([fast, slow])
    assert "| contestant | unlimited | 50 Mbit/s |" in text
    assert "| lightning_sg | 1.80 (1.00) | 0.90 (0.50) |" in text


def test_the_figure_shows_the_best_of_each_kind(tmp_path: Path) -> None:
    assert best(record("a", SPEEDS), ONE) == {"1F1B": 1.0, OURS: pytest.approx(1.8)}
    assert kind_of("ZBV zero bubble, M=4") == kind_of("interleaved zero bubble, M=2") == "zero bubble"
    assert kind_of("interleaved 1F1B, M=2") == "1F1B"
    assert kind_of(f"{OURS}, delay=2") is kind_of(COPIES) is None
    records = [record("a", SPEEDS), record("e", SPEEDS), record("f-latency", SPEEDS, megabits=None, latency_ms=50)]
    draw(records, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_rows_have_their_contestants() -> None:
    names = list(contestants(WORKLOADS["linears"], [1, 4]))
    assert "1F1B, M=1" not in names  # it needs as many microbatches as stages
    assert "GPipe, M=1" in names
    assert f"{OURS}, wire=int8" in chosen("f-rate", names, None)
    assert f"{OURS}, delay=4" in chosen("f-latency", names, None)
    assert not any("wire" in name or "delay=" in name for name in chosen("a", names, None))
    assert chosen("a", names, [OURS]) == [OURS]
    assert [condition["workload"] for condition in conditions("e", 150.0)] == [
        "emulated-2x150",
        "emulated-4x150",
        "emulated-8x150",
    ]


def test_rounds_of_several_passes_are_put_together() -> None:
    before = {"row": "a", "turns": [{"round": 0, "speed": 1.0}, {"round": 1, "speed": 2.0}]}
    found = together(before, {"row": "a", "turns": [{"round": 0, "speed": 3.0}]})
    assert found["turns"] == [*before["turns"], {"round": 2, "speed": 3.0}]
