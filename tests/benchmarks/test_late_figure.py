"""The figure of late gradients over delay and depth."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes

from benchmarks.late_figure import DELAYS, LEVELS, SERIES, draw, loss
from benchmarks.tasks import ALL_METHODS


def record(method: str, split: str, value: float, seed: int = 0) -> dict[str, object]:
    return {"method": method, "split": split, "seed": seed, "metrics": {"val_loss": value}}


def test_a_loss_is_the_mean_over_seeds_of_one_method_and_split() -> None:
    records = [record("a", "4 stages", 1.0), record("a", "4 stages", 2.0, 1), record("a", "2 stages", 9.0)]
    assert loss(records, "a", "4 stages") == 1.5
    assert loss(records, "b", "4 stages") is None


def test_what_is_drawn_can_be_trained() -> None:
    assert {method + words for method in SERIES for words in DELAYS} | set(LEVELS) <= set(ALL_METHODS)


def test_it_draws_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[str, list[float]]] = []
    plot = Axes.plot

    def noting(axes: Axes, *values: list[float], **style: object) -> object:
        lines.append((axes.get_xlabel(), list(values[1])))
        return plot(axes, *values, **style)  # type: ignore[arg-type]

    monkeypatch.setattr(Axes, "plot", noting)
    late = next(iter(SERIES))
    records = [record(late + ", delay 5", "4 stages", 3.0), record(late, "4 stages", 2.0)]
    records += [record(next(iter(LEVELS)), "whole", 1.0)]
    draw(records, tmp_path / "late.png")
    assert [values for _axis, values in lines] == [[2.0, 3.0], [1.0, 2.0]]
    assert plt.imread(tmp_path / "late.png").size > 10_000
