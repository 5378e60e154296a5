"""The command ``plan``: what it prints, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_sg import Chunks
from lightning_sg.cli import main
from lightning_sg.tools.plan import BoundaryPlan, Overhead, Plan, StagePlan
from lightning_sg.tools.plan.command import overhead_in, show, table
from tests.recurrent_models import Recurrent

ROOT = Path(__file__).parents[3]


def test_table_shows_loads_speed_up_and_predictors() -> None:
    stages = [StagePlan(10, 100, 300.0, 0), StagePlan(10, 100, 300.0, 1), StagePlan(10, 100, 200.0, 1)]
    cuts = [BoundaryPlan("a", 2**20, "one", 100.0, True), BoundaryPlan("b", 2**19, "one", 100.0, False)]
    planned = Plan(stages, cuts, 2)
    shown = table(planned)
    assert "rank 1 50%, rank 0 75%" in shown
    assert "at most 1.33 of 2; rank 0 is the bottleneck" in shown
    assert "Predictor at a, b: one" in shown
    assert "predictors add 25%" in table(Plan([StagePlan(s.parameters, s.flops, s.cost, 0) for s in stages], cuts, 1))


def test_a_measured_overhead_makes_the_bound_an_estimate() -> None:
    """A plain step computes for 1 and takes 1.2; a split one computes for 0.5 and takes 0.5 + 0.7."""
    stages = [StagePlan(10, 100, 300.0, 0), StagePlan(10, 100, 300.0, 1)]
    planned = Plan(stages, [BoundaryPlan("a", 8, "one", 0.0, True)], 2, Overhead(0.2, 0.7))
    assert planned.speedup == pytest.approx(1.0)
    assert "with this overhead about 1.00 of 2" in table(planned)


def test_the_overhead_is_an_option() -> None:
    assert overhead_in(["--config", "a.yaml"]) == (Overhead(), ["--config", "a.yaml"])
    assert overhead_in(["--overhead", "0.2", "1.5", "--config", "a.yaml"]) == (
        Overhead(0.2, 1.5),
        ["--config", "a.yaml"],
    )


@pytest.mark.parametrize("numbers", [["-1", "0.5"], ["0.5"], ["0.5", "x"], ["nan", "0"]])
def test_an_overhead_that_is_none_is_refused(numbers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead_in(["--overhead", *numbers])
    assert "--overhead" in capsys.readouterr().err


def test_plans_a_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-sg", "plan", "--config", "configs/digits_2stages.yaml"])
    monkeypatch.chdir(ROOT)
    main()
    shown = capsys.readouterr().out
    assert "rank 1 is the bottleneck" in shown or "rank 0 is the bottleneck" in shown
    assert not [warning for warning in recwarn if "args parameter" in str(warning.message)]


def test_numbers_processes_as_a_run_does() -> None:
    """`stage 0 (rank 1)`: the last stage is on rank 0."""
    stages = [StagePlan(10, 100, 300.0, 0), StagePlan(10, 100, 300.0, 1)]
    _headings, first, last = table(Plan(stages, [BoundaryPlan("a", 8, "one", 1.0, True)], 2)).splitlines()[:3]
    assert first.split()[:2] == ["0", "1"]
    assert last.split()[:2] == ["1", "0"]


class Streams(pl.LightningDataModule):
    """Sequences in chunks, as recurrent networks train on them."""

    def train_dataloader(self) -> Chunks:
        return Chunks([(torch.randn(4, 6, 3), torch.randn(4, 6, 3))], length=2)


@pytest.mark.parametrize("devices", [1, 2])
def test_says_that_boundaries_in_time_split_nothing(devices: int, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy="synthetic_gradients", logger=False, enable_progress_bar=False
    )
    try:
        show(Recurrent(), Streams(), trainer)
    except SystemExit as refused:
        assert devices == 2
        said = str(refused)
    else:
        assert devices == 1
        said = capsys.readouterr().out
    assert "Boundaries in time (memory) split nothing" in said


def test_exits_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="processes but only"):
        main(["plan", "--config", "configs/digits_2stages.yaml", "--trainer.devices", "7"])
