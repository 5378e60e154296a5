"""``lightning-sg advise``: what it measures, and what follows from it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_sg.cli import main
from lightning_sg.tools.advise.command import advice, table
from lightning_sg.tools.advise.measure import Measured
from tests.ranks import free_port

PLAIN = Measured(100.0, [{"compute": 1.0}], {"loss": 0.5}, {})


def split(milliseconds: float, first: float, last: float, predictor: float = 0.05, loss: float = 0.5) -> Measured:
    shares = [{"wait": first, "predictor": predictor}, {"wait": last}]
    return Measured(milliseconds, shares, {"loss": loss}, {"net.2": 0.4})


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (split(55, 0.02, 0.03), "Speed: 1.82 times"),
        (split(80, 0.02, 0.40), "There is more to gain: rank 1 is the bottleneck"),
        (split(80, 0.40, 0.02), "There is more to gain: rank 0 is the bottleneck"),
        (split(99, 0.02, 0.40, predictor=0.3), "does not pay here: the predictor takes 30%"),
        (split(55, 0.0, 0.0, loss=float("nan")), "The loss is not finite"),
        (PLAIN, "Nothing was decoupled"),
        (Measured(110.0, [{}], {}, {"net.2": 0.4}), "In one process decoupling only costs time"),
    ],
    ids=["fast", "first stage", "second stage", "predictor", "nan", "no boundary", "one process"],
)
def test_advice_follows_from_the_figures(measured: Measured, said: str) -> None:
    assert said in " ".join(advice(PLAIN, measured))


def test_a_fast_split_is_not_found_fault_with() -> None:
    assert not [line for line in advice(PLAIN, split(55, 0.02, 0.03)) if "gain" in line or "pay" in line]


def test_table_has_both_side_by_side() -> None:
    rows = [line.split() for line in table(PLAIN, split(55, 0.1, 0.2))]
    assert ["ms", "a", "step", "100.0", "55.0"] in rows
    assert ["wait,", "rank", "1", "10%"] in rows
    assert ["wait,", "rank", "0", "20%"] in rows
    assert ["cosine", "at", "net.2", "0.40"] in rows


@pytest.mark.timeout(400)
def test_measures_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-sg"])
    main(["init"])
    main(["advise", "--config", "spirals.yaml", "--steps", "8"])
    said = capsys.readouterr().out
    assert "ms a step" in said
    assert "train_loss, last steps" in said
    assert "cosine at net.6" in said
    assert "Speed: " in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "spirals.py",
        "spirals.yaml",
    ]


def test_a_configuration_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["advise"])
    assert "--config FILE" in capsys.readouterr().err
