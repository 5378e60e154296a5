"""The command ``report``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import re
import sys

import pytest

from lightning_sg import cli
from lightning_sg.cli import lightning
from tests.tools.report.runs import Checked, make_run


@pytest.fixture(autouse=True)
def no_own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-sg"])


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("columns", ["100", "30"])
def test_prints_numbers_and_paths(tmp_path, undrawn, monkeypatch, capsys, rich, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(lightning, "JSONARGPARSE", False)  # not needed for a report
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    run = make_run(tmp_path / "[bold]run", ["net.1", "[red]x[/red]"])
    baseline = make_run(tmp_path / "plain", loss=0.75)
    cli.main(["report", str(run), "--baseline", str(baseline), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert re.search(r"val_loss +1\.167 +0\.9167 +\+0\.25", printed)
    assert re.search(r"net\.1 +0\.5 +5\.75 +0\.02 +0\.5 +25 % +25 %", printed)
    assert "[red]x" in printed
    for name in ("report.html", "pixel.png"):
        assert f"Written: {tmp_path / 'out' / name}\n" in printed
        assert (tmp_path / "out" / name).stat().st_size


def test_reads_the_arguments_of_the_process(tmp_path, undrawn, monkeypatch, capsys):
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["lightning-sg", "report", str(run)])
    cli.main()
    assert "report.html" in capsys.readouterr().out


def test_baselines_in_one_option_or_in_several(tmp_path, undrawn, capsys):
    run, a, b, c = (str(make_run(tmp_path / name)) for name in ("run", "a", "b", "c"))
    cli.main(["report", run, "--baseline", a, b, "--baseline", c])
    page = Checked((tmp_path / "run" / "report" / "report.html").read_text(encoding="utf-8"))
    assert page.texts.count("difference") == 3


def test_help_names_the_report(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", "--help"])
    assert not ended.value.code
    assert "lightning-sg report" in capsys.readouterr().out
    cli.main(["--help"])
    assert "report" in capsys.readouterr().out


def test_exits_with_the_reason(tmp_path, undrawn, monkeypatch):
    with pytest.raises(SystemExit, match="does not exist"):
        cli.main(["report", str(tmp_path / "nothing")])
    run = make_run(tmp_path / "run")
    with pytest.raises(SystemExit, match="does not exist"):
        cli.main(["report", str(run), "--baseline", str(tmp_path / "nothing")])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot be written"):
        cli.main(["report", str(run), "--out", str(tmp_path / "file")])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=re.escape('pip install "lightning-sg[report]"')):
        cli.main(["report", str(run)])
