"""The package as it is published: what is in the wheel, that it works alone, and how long it takes to import."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lightning_sg
from tests.ranks import free_port

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_SECONDS = 0.3


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Runs a command that sees nothing of this clone; returns what it prints."""
    hidden = ("PYTHONPATH", "LOCAL_", "MASTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), **variables}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(source: Path, target: Path) -> tuple[Path, Path]:
    """A wheel and a source distribution of the project in a folder."""
    paths = os.pathsep.join(path for path in sys.path if path)
    run([sys.executable, "-m", "hatchling", "build", "-d", str(target)], source, PYTHONPATH=paths)
    [wheel], [archive] = target.glob("*.whl"), target.glob("*.tar.gz")
    return wheel, archive


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def clean(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel in it. It has the dependencies of this one, but not this clone."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(built[0])], folder)
    [packages] = folder.glob("lib/python*/site-packages")
    # A path file does not read the path files in what it leads to, and so does not find an editable install.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    files = (path for path in (ROOT / "lightning_sg").rglob("*") if path.is_file() and path.suffix != ".pyc")
    here = {path.relative_to(ROOT).as_posix() for path in files}
    assert {"lightning_sg/py.typed", "lightning_sg/tools/starter/files/spirals.yaml"} <= here
    assert names_in(built[0]) == here


def test_the_source_distribution_makes_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    for name in ("README.md", "LICENSE", "CITATION.cff", "Makefile", "constraints.txt", "tests/conftest.py"):
        assert (source / name).exists(), name
    assert names_in(build(source, tmp_path / "dist")[0]) == names_in(built[0])


def test_metadata(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(archive.read(name).decode())
    assert metadata["Version"] == lightning_sg.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "# lightning-sg" in metadata.get_payload()
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in metadata.get_all("Classifier")
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])


def test_what_the_package_says_of_itself_agrees() -> None:
    assert f"version: {lightning_sg.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    needed = {Requirement(each).name: Requirement(each) for each in PROJECT["dependencies"]}
    lowest = (ROOT / "constraints-lowest.txt").read_text().split()
    for pin in map(Requirement, lowest):
        if pin.name in needed and needed[pin.name].specifier:
            version = str(pin.specifier).removeprefix("==")
            assert f">={'.'.join(version.split('.')[:2])}" in str(needed[pin.name].specifier), pin


@pytest.mark.timeout(300)
def test_the_installed_package_trains_on_two_processes(clean: Path, tmp_path: Path) -> None:
    """The README's first commands, without the clone."""
    where = run([str(clean / "python"), "-c", "import lightning_sg; print(lightning_sg.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(clean.parent)
    assert lightning_sg.__version__ in run([str(clean / "lightning-sg"), "--version"], tmp_path)
    run([str(clean / "lightning-sg"), "init", "first"], tmp_path)
    quick = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    command = [str(clean / "lightning-sg"), "fit", "--config", "spirals.yaml", *quick]
    assert "Starting with 2 processes" in run(command, tmp_path / "first")


@pytest.mark.timeout(300)
def test_import_takes_little_longer_than_lightnings(tmp_path: Path) -> None:
    """In time of the processor, from compiled files, the best of a few: other programs must not count."""
    code = (
        "import time, lightning.pytorch\nstart = time.process_time()\nimport lightning_sg\n"
        "print(time.process_time() - start)"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    variables = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": ""}  # the first one compiles
    seconds = [float(run([sys.executable, "-c", code], tmp_path, **variables).split()[-1]) for _ in range(3)]
    assert min(seconds) <= IMPORT_SECONDS, seconds
