"""The command line: this package's own commands, and all of Lightning's (``fit``, ``test``, ...)."""

from lightning_sg.cli.main import main

__all__ = ["main"]
