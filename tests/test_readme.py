"""The README: every Python block runs as it stands, and every command does, in the order in which they are printed."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_sg.cli import main
from tests.ranks import free_port

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, with a ``python`` and a ``lightning-sg`` on the path."""
    home = tmp_path_factory.mktemp("home")
    (home / "bin").mkdir()
    for name, words in {"python": "", "lightning-sg": "-m lightning_sg"}.items():
        script = home / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return home


def run(home: Path, command: list[str], folder: Path) -> str:
    """Runs a command as a user would; returns what it prints, once no process holds its output any more."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_", "MASTER_"))}
    environment |= {
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_there_are_blocks() -> None:
    assert len(blocks("python")) >= 6
    assert len(blocks("bash")) >= 3


@pytest.mark.parametrize("number", range(len(blocks("python"))))
@pytest.mark.timeout(420)
def test_python_block_runs(number: int, home: Path, tmp_path: Path) -> None:
    """Each as a script of its own, beside the file that `lightning-sg init` writes."""
    code = blocks("python")[number]
    main(["init", str(tmp_path)])
    (tmp_path / "block.py").write_text(code)
    printed = run(home, [sys.executable, "block.py"], tmp_path)
    assert ("reached." in printed) == (".fit(" in code), printed
    devices = re.search(r"devices=([2-9])", code)
    assert devices is None or f"Starting with {devices[1]} processes" in printed


@pytest.mark.timeout(1200)
def test_commands_run_in_order(home: Path, tmp_path: Path) -> None:
    commands = [block for block in blocks("bash") if "make " not in block]
    script = "set -e\n" + "\n".join(commands)
    printed = run(home, ["bash", "-c", script], tmp_path)
    assert printed.count("`Trainer.fit` stopped: ") == 4
    assert (tmp_path / "first" / "outputs" / "spirals" / "version_1" / "timeline.json").exists()
    assert (tmp_path / "first" / "outputs" / "spirals" / "version_1" / "report" / "report.html").exists()
    assert "When exact gradients travel up" in printed


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", TEXT)
    local = [path for pair in links for path in pair if path and not path.startswith("http")]
    assert len(local) > 20
    for link in local:
        path, _, anchor = link.partition("#")
        page = ROOT / path if path else ROOT / "README.md"
        assert page.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, link
