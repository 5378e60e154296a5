"""The commands: what each is called, what it does in one line, and what runs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

_INTRODUCTION = """\
usage: lightning-sg COMMAND [OPTIONS]

Trains one network in stages that do not wait for each other.
"""

_FOOTER = """
'lightning-sg COMMAND --help' describes a command, 'lightning-sg --version' prints versions."""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: What it does, in one line.
        run: Runs it with the arguments after its name; ``None`` for Lightning's own.
    """

    summary: str
    run: Callable[[list[str]], None] | None = None


def _init(arguments: list[str]) -> None:
    from lightning_sg.tools.starter.command import main as init

    init(arguments)


def _plan(arguments: list[str]) -> None:
    from lightning_sg.cli.lightning import build
    from lightning_sg.tools.plan.command import DESCRIPTION, overhead_in, show

    # Lightning warns that new processes would not get these arguments; planning starts none.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    overhead, arguments = overhead_in(arguments)
    cli = build("plan", DESCRIPTION, arguments)
    show(cli.model, cli.datamodule, cli.trainer, overhead)


def _advise(arguments: list[str]) -> None:
    from lightning_sg.tools.advise.command import main as advise

    advise(arguments)


def _report(arguments: list[str]) -> None:
    from lightning_sg.tools.report.command import main as report

    report(arguments)


def _timeline(arguments: list[str]) -> None:
    from lightning_sg.tools.timeline.command import main as timeline

    timeline(arguments)


def _merge(arguments: list[str]) -> None:
    from lightning_sg.checkpoint.merge import main as merge

    merge(arguments)


def _explain(arguments: list[str]) -> None:
    from lightning_sg.tools.explain.command import main as explain

    explain(arguments)


#: What to print above each group of commands, with the names in it.
GROUPS: dict[str, tuple[str, ...]] = {
    "To begin": ("init", "plan", "advise"),
    "Lightning's commands, for a LightningModule and data named in a configuration": (
        "fit",
        "validate",
        "test",
        "predict",
    ),
    "After a run": ("report", "timeline", "merge", "explain"),
}

#: All commands by name. This package's own import what they need only when they run.
COMMANDS: dict[str, Command] = {
    "init": Command("writes a small model, a training script and a configuration to start from", _init),
    "plan": Command("shows how a configuration would be split: stages, costs and the speed-up to expect", _plan),
    "advise": Command("trains a few steps with and without the split, and says whether it is worth it", _advise),
    "fit": Command("trains"),
    "validate": Command("runs one epoch of validation"),
    "test": Command("runs one epoch of tests"),
    "predict": Command("predicts"),
    "report": Command("draws what a run has logged, beside other runs", _report),
    "timeline": Command("draws what each process did when", _timeline),
    "merge": Command("merges the shards of a checkpoint into one file", _merge),
    "explain": Command("says what causes an error of this package, and what to do", _explain),
}


def overview() -> str:
    """All commands with a line each."""
    width = max(map(len, COMMANDS))
    lines = [_INTRODUCTION]
    for title, names in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<{width}}  {COMMANDS[name].summary}" for name in names), ""]
    return "\n".join(lines).rstrip() + "\n" + _FOOTER


__all__ = ["COMMANDS", "GROUPS", "Command", "overview"]
