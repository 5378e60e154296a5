"""Recurrent networks: the plan, a run of it, and the table."""

from __future__ import annotations

from typing import Any

from benchmarks import recurrent


def test_recurrent_runs_are_planned_and_one_is_trained():
    planned = recurrent.plan(["copy", "text"], [0, 1], None, 7)
    assert len(planned) == len(set(planned)) == 2 * (4 * 4 + 1 + 5)
    assert {run.updates for run in planned} == {7}
    record = recurrent.train(recurrent.Run("copy", recurrent.AUXILIARY, 2, 0, 10), None)
    assert record["solved"] == 0
    assert len(record["curve"]) == 10


def test_recurrent_table_has_means_and_ranges():
    def record(task: str, method: str, chunk: int, seed: int, **others: Any) -> dict[str, Any]:
        return {"task": task, "method": method, "chunk": chunk, "seed": seed, "updates": 100, **others}

    records = [record("copy", recurrent.TRUNCATED, 3, seed, solved=4 + seed) for seed in (0, 1)]
    records += [record("copy", recurrent.SYNTHETIC, 5, 0, solved=9)]
    records += [record("text", recurrent.TRUNCATED, 8, 0, bits=2.5)]
    records += [{**record("copy", recurrent.SYNTHETIC, 5, 0, solved=11), "updates": 200}]
    printed = recurrent.table(records)
    assert "| truncated | 4.5 (4-5, 2 seeds) | - |" in printed
    assert "| synthetic gradients | - | 9 |" in printed
    assert "copy, 200 updates\n\n| | T = 5 |\n|---|---|\n| synthetic gradients | 11 |" in printed
    assert "| truncated | 2.500 |" in printed
