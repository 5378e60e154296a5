"""``lightning-sg advise``: what it measures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_sg.cli import main
from tests.ranks import free_port


@pytest.mark.timeout(400)
def test_measures_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-sg"])
    main(["init"])
    main(["advise", "--config", "spirals.yaml", "--steps", "8", "--cut", "net.3"])
    said = capsys.readouterr().out
    assert "ms a step" in said
    assert "train_loss, last steps" in said
    assert "cosine at net.6" in said
    assert "cosine at net.3" in said
    assert "peak memory, MiB" in said
    assert "The best cut is" in said
    assert "Speed: " in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "spirals.py",
        "spirals.yaml",
    ]


def test_a_configuration_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["advise"])
    assert "--config FILE" in capsys.readouterr().err
