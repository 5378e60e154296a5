"""``lightning-sg init``: what it writes runs, and nothing is overwritten."""

from __future__ import annotations

import ast
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_sg.cli import main
from lightning_sg.tools.starter.command import FILES
from tests.ranks import free_port

ROOT = Path(__file__).parents[3]
QUICK = ["--trainer.max_epochs=3", "--trainer.enable_progress_bar=false"]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in the user's folder; returns when no process holds its output any more."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_", "MASTER_"))}
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user") / "first"
    main(["init", str(folder)])
    return folder


def test_writes_its_files_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(FILES)
    (folder / "spirals.yaml").read_text()
    with pytest.raises(SystemExit, match=r"spirals\.py.*already there; nothing was written"):
        main(["init", str(folder)])


def test_the_script_is_well_written(folder: Path) -> None:
    assert ast.get_docstring(ast.parse((folder / "spirals.py").read_text()))
    checked = run(folder, "-m", "ruff", "check", "--isolated", "--line-length=120", "--select=E,F,UP,B", "spirals.py")
    assert checked.returncode == 0, checked.stdout
    formatted = run(folder, "-m", "ruff", "format", "--isolated", "--line-length=120", "--check", "spirals.py")
    assert formatted.returncode == 0, formatted.stdout


@pytest.mark.timeout(300)
def test_the_configuration_trains_on_two_processes(folder: Path) -> None:
    fitted = run(folder, "-m", "lightning_sg", "fit", "--config", "spirals.yaml", *QUICK)
    assert fitted.returncode == 0, fitted.stdout
    assert "Starting with 2 processes" in fitted.stdout
    [metrics] = folder.rglob("metrics.csv")
    reached = [float(row["val_accuracy"]) for row in csv.DictReader(metrics.open()) if row["val_accuracy"]]
    assert reached[-1] > 0.9


@pytest.mark.timeout(300)
def test_the_script_trains_on_two_processes(folder: Path) -> None:
    trained = run(folder, "spirals.py")
    assert trained.returncode == 0, trained.stdout
    assert "Starting with 2 processes" in trained.stdout
    assert "`max_epochs=10` reached" in trained.stdout


def test_the_plan_of_the_configuration(folder: Path) -> None:
    planned = run(folder, "-m", "lightning_sg", "plan", "--config", "spirals.yaml")
    assert planned.returncode == 0, planned.stdout
    [bound] = [line for line in planned.stdout.splitlines() if line.startswith("Speed-up")]
    assert float(bound.split("at most ")[1].split()[0]) > 1.2
