"""``lightning-sg init``: writes the starter files into a folder and says what to run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lightning_sg.files import write_atomically

#: The files, by the names under which they are written. The script is not a module of this package, but a user's.
FILES = {"spirals.py": "spirals.py.txt", "spirals.yaml": "spirals.yaml"}

_NEXT = """\
Now train it on two processes, either way:

{cd}  python spirals.py
  lightning-sg fit --config spirals.yaml --sg.delay 2   # needs: pip install "lightning-sg[cli]"

Then replace the model and the data in spirals.py by your own."""


def main(args: Sequence[str] | None = None) -> None:
    """Writes the files; overwrites none.

    Args:
        args: The arguments after ``init``; by default those of the process.

    Raises:
        SystemExit: If a file exists already, or cannot be written.
    """
    folder: Path = parser().parse_args(args).folder
    present = [str(folder / name) for name in FILES if (folder / name).exists()]
    if present:
        raise SystemExit(f"{', '.join(present)}: already there; nothing was written. Give another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in FILES.items():
            with write_atomically(folder / name) as file:
                file.write(files(__package__).joinpath("files", source).read_bytes())
            print(f"Written: {folder / name}")
    except OSError as error:
        raise SystemExit(str(error)) from None
    print("\n" + _NEXT.format(cd="" if folder == Path() else f"  cd {folder}\n"))


def parser() -> argparse.ArgumentParser:
    """The arguments of ``init``."""
    parser = argparse.ArgumentParser(
        prog="lightning-sg init",
        description="Writes spirals.py, a small LightningModule with its data and a training script, and spirals.yaml, "
        "a configuration for 'lightning-sg fit'. Both train it in two stages on two processes.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", default=Path(), help="default: this folder")
    return parser


__all__ = ["FILES", "main", "parser"]
