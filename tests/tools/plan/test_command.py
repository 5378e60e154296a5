"""The command ``plan``: what it prints, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_sg.cli import main
from lightning_sg.tools.plan import BoundaryPlan, Plan, StagePlan
from lightning_sg.tools.plan.command import table

ROOT = Path(__file__).parents[3]


def test_table_shows_loads_speed_up_and_predictors() -> None:
    stages = [StagePlan(10, 100, 300.0, 0), StagePlan(10, 100, 300.0, 1), StagePlan(10, 100, 200.0, 1)]
    cuts = [BoundaryPlan("a", 2**20, "one", 100.0, True), BoundaryPlan("b", 2**19, "one", 100.0, False)]
    planned = Plan(stages, cuts, 2)
    shown = table(planned)
    assert "process 0 50%, process 1 75%" in shown
    assert "at most 1.33 of 2; process 1 is the bottleneck" in shown
    assert "Predictor at a, b: one" in shown
    assert "predictors add 25%" in table(Plan([StagePlan(s.parameters, s.flops, s.cost, 0) for s in stages], cuts, 1))


def test_plans_a_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-sg", "plan", "--config", "configs/digits_2stages.yaml"])
    monkeypatch.chdir(ROOT)
    main()
    shown = capsys.readouterr().out
    assert "process 1 is the bottleneck" in shown or "process 0 is the bottleneck" in shown
    assert not [warning for warning in recwarn if "args parameter" in str(warning.message)]


def test_exits_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="processes but only"):
        main(["plan", "--config", "configs/digits_2stages.yaml", "--trainer.devices", "7"])
