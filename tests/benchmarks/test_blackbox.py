"""The black-box benchmark: every task runs with every method, and the tables say what was reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import blackbox, blackbox_tasks
from benchmarks.blackbox_tasks import BACKPROPAGATION, MEANS

CASES = [(task, method) for task, plan in blackbox.PLANS.items() for method in plan.methods]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "method"), CASES)
def test_every_method_runs_a_few_steps(task: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if task in ("rounding", "forest"):
        pytest.importorskip("sklearn")
    if task == "pendulum":
        pytest.importorskip("scipy")
    images = torch.rand(200, 784, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(blackbox_tasks, "grey_images", lambda folder, name: images)
    if method == MEANS:
        monkeypatch.setattr(blackbox_tasks, "_means", lambda train, test, seed: 0.02)
    record = blackbox.run(task, method, 0, 4, "nowhere")
    metrics = record["metrics"]
    assert metrics.keys() <= {"before", *blackbox.PLANS[task].shown}
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())


def test_backpropagation_through_the_copy_is_that_of_the_same_pendulum() -> None:
    pytest.importorskip("scipy")
    before = blackbox.run("pendulum", "critic", 0, 0, None)["metrics"]
    copied = blackbox.run("pendulum", BACKPROPAGATION, 0, 0, None)["metrics"]
    assert before == copied
    torch.manual_seed(0)
    module = blackbox_tasks.Copy(torch.nn.Identity())  # type: ignore[arg-type]
    start, goal = blackbox_tasks.simulator.pendulums(256, seed=98).tensors
    assert float(module.costs((start, goal)).mean()) == pytest.approx(copied["cost"], rel=1e-3)


def test_the_table_compares_with_backpropagation_of_the_same_seed() -> None:
    def record(method: str, seed: int, steps: int, cost: float) -> dict[str, Any]:
        metrics = {"before": 1.0, "cost": cost}
        return {"task": "pendulum", "method": method, "seed": seed, "steps": steps, "metrics": metrics, "seconds": 1}

    records = [
        record(BACKPROPAGATION, 0, 240, 0.0),
        record(BACKPROPAGATION, 1, 240, 0.5),
        record("critic", 0, 240, 0.1),
        record("critic", 1, 240, 0.5),
    ]
    printed = blackbox.table(records)
    assert "| critic | 240 | 1.000 ± 0.000 | 0.3000 ± 0.2828 | 95.0 ± 7.1 | 2 |" in printed
    assert "toy" not in printed


def test_a_biased_estimate_is_not_put_in_standard_errors() -> None:
    metrics = {"probability": 0.1, "loss": 0.25, "standard_errors": 1e6, "variance": 0.0}
    record = {"task": "toy", "method": "critic", "seed": 0, "steps": 800, "metrics": metrics, "seconds": 1}
    assert "| critic | 800 | 0.100 | 0.25000 | biased | 0 | 1 |" in blackbox.table([record])
