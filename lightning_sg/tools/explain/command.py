"""``lightning-sg explain``: prints what the troubleshooting page says of an error."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from importlib.resources import files


def sections() -> dict[str, str]:
    """What the troubleshooting page says of each error, by the name of its class."""
    page = files(__package__).joinpath("troubleshooting.md").read_text("utf-8")
    _start, *parts = re.split(r"^## ", page, flags=re.MULTILINE)
    return {part.partition("\n")[0].strip(): part.partition("\n")[2].strip() for part in parts}


def main(args: Sequence[str] | None = None) -> None:
    """Prints the section of one error, or all names.

    Args:
        args: The arguments after ``explain``; by default those of the process.

    Raises:
        SystemExit: If there is no such error.
    """
    name, known = parser().parse_args(args).error, sections()
    if name is None:
        print("\n".join(known))
        return
    found = {each.lower(): each for each in known}.get(name.lower().rpartition(".")[2])
    if found is None:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
        raise SystemExit(f"There is no page about {name}. {hint}")
    print(f"{found}\n\n{known[found]}")


def parser() -> argparse.ArgumentParser:
    """The arguments of ``explain``."""
    parser = argparse.ArgumentParser(
        prog="lightning-sg explain",
        description="Prints what causes an error of this package and what to do about it, as the page on "
        "troubleshooting does. Without an error, lists the errors that it knows.",
    )
    parser.add_argument("error", metavar="ERROR", nargs="?", help="the class of the error, such as StageLostError")
    return parser


__all__ = ["main", "parser", "sections"]
