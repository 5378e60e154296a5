"""Takes the time from ``git clone`` to one's own module trained on two processes, following the README.

    python -m benchmarks.stopwatch                 # clones this repository
    python -m benchmarks.stopwatch --url URL

It does what the README says, in a folder and an environment of its own: clone, install, change a plain script of
Lightning in the places that the README names, run it. Waiting is measured; typing is counted, at a pace of
:data:`PACE` characters a minute. The download and installation of torch is left out: torch, and what it requires, is
that of the Python that runs this.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

#: Characters that a person types in a minute: 40 words of five letters and a space.
PACE = 240
#: A module of one's own, which Lightning trains on one device.
PLAIN = """\
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Sine(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(1, 128),
            nn.Tanh(),
            nn.Linear(128, 128),
            nn.Tanh(),
            nn.Linear(128, 1),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.body(x) - y).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    x = torch.linspace(-3, 3, 2000)[:, None]
    loader = DataLoader(TensorDataset(x, x.sin()), batch_size=50, shuffle=True)
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=5)
    trainer.fit(Sine(), loader)
"""
#: What the README has one change: before what, and what is typed.
EDITS = (
    ("\n\nclass Sine", "\nfrom lightning_sg import Boundary\n"),
    ("            nn.Linear(128, 128),\n", "            Boundary(),\n"),
    ("    x = torch.linspace", "    pl.seed_everything(0)\n"),
    ("devices=1, ", 'strategy="synthetic_gradients", '),
)
INSTALL = "pip install '.[cli]'"


@dataclass(frozen=True)
class Lap:
    """One step on the way.

    Attributes:
        name: What is done.
        typed: How many characters are typed for it.
        waited: Seconds until it is done.
    """

    name: str
    typed: int
    waited: float

    @property
    def seconds(self) -> float:
        """The time that it takes, typing included."""
        return 60 * self.typed / PACE + self.waited


def decoupled(plain: str) -> tuple[str, int]:
    """The script after the edits, and how many characters they are."""
    typed = 0
    for before, text in EDITS:
        assert plain.count(before) == 1, f"{before!r} is not there once"
        plain = plain.replace(before, text + before)
        typed += len(text.strip())
    return plain.replace("devices=1", "devices=2"), typed + 1


def main() -> None:
    """Does it all and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=str(Path(__file__).resolve().parents[1]), help="what to clone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        laps = race(Path(folder), arguments.url)
    print(table(laps))


def race(folder: Path, url: str) -> list[Lap]:
    """Does all steps in an empty folder; returns what each took."""
    clone, work, python = folder / "clone", folder / "work", folder / "environment" / "bin" / "python"
    work.mkdir()
    laps = [_lap("clone", f"git clone {url} clone", ["git", "clone", "--quiet", url, str(clone)], folder)]
    making = [sys.executable, "-m", "venv", str(folder / "environment")]
    laps.append(_lap("make an environment", "python -m venv environment", making, folder))
    _lend_torch(folder / "torch", python)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", ".[cli]"]
    laps.append(_lap("install", f"cd clone\n{INSTALL}", pip, clone))
    script, typed = decoupled(PLAIN)
    (work / "sine.py").write_text(script)
    laps.append(Lap("change one's own script", typed, 0.0))
    laps.append(_lap("train on two processes", "python sine.py", [str(python), "sine.py"], work, check="2 processes"))
    return laps


def _lap(name: str, typed: str, command: list[str], folder: Path, check: str = "") -> Lap:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MASTER_PORT", "LOCAL_RANK")}
    begun = time.perf_counter()
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    waited = time.perf_counter() - begun
    if ran.returncode or check not in ran.stdout + ran.stderr:
        raise SystemExit(f"'{typed}' failed:\n{(ran.stdout + ran.stderr)[-3000:]}")
    return Lap(name, len(typed), waited)


def _lend_torch(folder: Path, python: Path) -> None:
    """Lets another environment see this one's torch and what torch requires, and nothing else of it."""
    folder.mkdir()
    for name in _required("torch"):
        found = distribution(name)
        for top in {Path(str(file)).parts[0] for file in found.files or ()}:
            source = Path(str(found.locate_file(top)))
            if top not in ("..", "__pycache__") and source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)
    packages = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(packages, capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "torch.pth").write_text(f"{folder}\n")


def _required(name: str) -> set[str]:
    """A package and all that it requires, as far as it is installed."""
    found: set[str] = set()
    left = [name]
    while left:
        each = left.pop()
        try:
            requires = distribution(each).requires or []
        except PackageNotFoundError:
            continue
        if each not in found:
            found.add(each)
            left += [re.split(r"[^\w.-]", line)[0] for line in requires if "extra ==" not in line]
    return found


def table(laps: list[Lap]) -> str:
    """The laps as a table in Markdown."""
    rows = ["| step | typed, characters | waited, s | in all, s |", "|---|---|---|---|"]
    rows += [f"| {lap.name} | {lap.typed} | {lap.waited:.0f} | {lap.seconds:.0f} |" for lap in laps]
    typed, waited = sum(lap.typed for lap in laps), sum(lap.waited for lap in laps)
    return "\n".join([*rows, f"| **in all** | {typed} | {waited:.0f} | **{sum(lap.seconds for lap in laps):.0f}** |"])


if __name__ == "__main__":
    main()
