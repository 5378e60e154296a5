"""The documentation as far as it can be checked without building it: nothing public is left out, and its code runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lightning_sg
from tests.ranks import free_port

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


def test_the_page_for_lightnings_gallery_has_an_example_that_runs(tmp_path: Path) -> None:
    page = (DOCS / "gallery" / "synthetic_gradients.rst").read_text()
    script = re.findall(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", page, re.MULTILINE)[0]
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    ran = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert "The stages on 2 processes" in ran.stderr


@pytest.mark.timeout(600)
def test_the_site_is_built_without_a_warning_and_all_tutorials_run(tmp_path: Path) -> None:
    """As `make docs` does it."""
    if not all(map(importlib.util.find_spec, ("sphinx", "furo", "myst_nb"))):
        pytest.skip("needs docs/requirements.txt, which `make` installs")
    options = ["-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
    ran = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "html")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "html" / "index.html").exists()
