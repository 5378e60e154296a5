"""What compression costs is compared seed by seed."""

from __future__ import annotations

from typing import Any

from benchmarks import wire
from benchmarks.tasks import TASKS
from lightning_sg.transport import COMPRESSIONS


def test_what_the_wire_costs_is_compared_seed_by_seed() -> None:
    def run(wire: str, seed: int, value: float, task: str = "char-800") -> dict[str, Any]:
        metric = {TASKS[task].metric.key: value}
        return {"task": task, "wire": wire, "seed": seed, "metrics": metric}

    records = [run("full", 0, 2.0), run("full", 1, 3.0), run("int8", 1, 3.1), run("int8", 0, 2.3), run("int8", 2, 9.0)]
    records += [run("full", 0, 0.2, "regression"), run("bf16", 0, 0.21, "regression")]
    text = wire.table(records)
    assert "| int8 | 4.8000 ± 3.6592 | +0.2000 ± 0.1414 | 3 |" in text
    assert "| bf16 | 0.2100 | +5.00 % | 1 |" in text
    planned = wire.plan(["char-800"], [0, 1])
    assert [run.wire for run in planned] == [*COMPRESSIONS, *COMPRESSIONS]
    assert {(run.split, run.devices) for run in planned} == {("2 stages", 2)}
