"""The documentation as far as it can be checked without building it: nothing public is left out, and its code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_sg

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LOOPS = re.findall(r"^```python\n(.*?)^```$", (DOCS / "loops.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_reference_has_every_public_name() -> None:
    reference = (DOCS / "api.rst").read_text()
    listed = re.findall(r"^\.\. auto\w+:: (?:lightning_sg\.)?(\w+)$", reference, re.MULTILINE)
    assert sorted(listed) == sorted(lightning_sg.__all__)


def test_every_page_is_in_a_menu() -> None:
    menus = {"index": "index.md", "tutorials/index": "tutorials/index.md"}
    shown = set(menus)
    for name, page in menus.items():
        folder = Path(name).parent
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            shown |= {(folder / entry).as_posix() for entry in entries}
    pages = {
        path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md") if "_build" not in path.parts
    }
    decisions = {page for page in pages if page.startswith("decisions/")} - {"decisions/README"}  # linked from there
    assert pages | {"api"} == shown | decisions


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS.rglob("*.md"):
        if "_build" in page.parts:
            continue
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("number", range(len(LOOPS)))
def test_loops_run_as_they_stand(number: int, tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOPS[number])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "loop.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
