"""Help for a terminal: docstrings without markup, public names only, and a hint where an option is misspelt."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter

from lightning_sg.lightning_api import LightningArgumentParser

#: A cross-reference as Sphinx writes it, such as ``:class:`~package.Name```; the name's last part is what readers see.
_ROLE = re.compile(r":[a-z:]+:`~?(?:[\w.]+\.)?([^`]+)`")
#: A class of this package that is not exported: its path has a module in it. Lightning lists what has been imported.
_INTERNAL = re.compile(r"(?:, )?\blightning_sg(?:\.\w+){2,}")


def without_markup(text: str) -> str:
    """Text of a docstring without cross-references and internal classes."""
    return _INTERNAL.sub("", _ROLE.sub(r"\1", text)).replace("known subclasses: , ", "known subclasses: ")


class PlainHelp(DefaultHelpFormatter):
    """Formats help for people who have never seen the source."""

    def start_section(self, heading: str | None) -> None:
        """Begins a group of options."""
        super().start_section(None if heading is None else without_markup(heading))

    def add_text(self, text: str | None) -> None:
        """Adds a paragraph."""
        super().add_text(None if text is None else without_markup(text))

    def _get_help_string(self, action: argparse.Action) -> str:
        return without_markup(super()._get_help_string(action) or "")


class Parser(LightningArgumentParser):
    """Lightning's parser with plain help and short usage lines.

    Args:
        *args: Lightning's.
        **kwargs: Lightning's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs = {"formatter_class": PlainHelp, "prog": "lightning-sg", **kwargs}
        kwargs.setdefault("usage", "lightning-sg COMMAND --config FILE [OPTIONS]")
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with a message, and names the option that was probably meant."""
        parser = getattr(ex, "subcommand_parser", None) or self
        super().error(message + hint(message, parser), ex)


def hint(message: str, parser: argparse.ArgumentParser) -> str:
    """The nearest options of ``parser`` to one that a message calls unknown, as a sentence; or nothing."""
    found = re.search(r"unrecognized arguments: (--[\w.+]+)", message, re.IGNORECASE)
    if found is None:
        return ""
    options = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(found[1].split("=")[0], options, n=1, cutoff=0.75)
    return f". Did you mean {near[0]}?" if near else ""


__all__ = ["Parser", "PlainHelp", "hint", "without_markup"]
