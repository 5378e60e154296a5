"""``lightning-sg report``: makes a report and prints its tables, with rich if it is installed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_sg.tools.report import Report, ReportError, report
from lightning_sg.tools.report.tables import Table, boundary_table, value_table
from lightning_sg.tools.text import aligned


def main(args: Sequence[str] | None = None) -> None:
    """Makes a report, prints its numbers and the paths of its files.

    Args:
        args: The arguments after ``report``; by default those of the process.

    Raises:
        SystemExit: If the report cannot be made, with the reason.
    """
    arguments = parser().parse_args(args)
    try:
        made = report(arguments.run, arguments.baseline, arguments.out)
    except ReportError as error:
        raise SystemExit(str(error)) from None
    try:
        _print_rich(made)
    except ImportError:
        _print_plain(made)


def parser() -> argparse.ArgumentParser:
    """The arguments of ``report``."""
    parser = argparse.ArgumentParser(
        prog="lightning-sg report",
        description="Draws a run's metrics beside those of its baselines, and the alignment at its boundaries; writes "
        "PNG files and one HTML page.",
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="the folder of a CSVLogger (with metrics.csv), the file itself, a folder of version_* folders (the newest "
        "one that has logged something is taken), a folder of TensorBoard's event files, or one of Weights & "
        "Biases ('wandb', or an 'offline-run-...' in it)",
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        action="extend",
        nargs="+",
        default=[],
        help="one or more runs to compare with, such as plain backpropagation; may be repeated",
    )
    parser.add_argument("--out", metavar="FOLDER", help="folder for the files (default: 'report' in the run's folder)")
    return parser


def _tables(made: Report) -> list[tuple[str, Table]]:
    """The tables to print, with their titles."""
    tables = [("Final values", value_table(made.run, made.baselines, made.rows))] if made.rows else []
    if made.boundaries:
        tables.append(("Boundaries, at the end", boundary_table(made.boundaries, short=True)))
    return tables


def _footnotes(made: Report) -> list[str]:
    return ["* median of the last tenth of the logged values"] if any(row.smoothed for row in made.rows) else []


def _print_rich(made: Report) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    # Text instead of str: rich would take brackets in names for markup.
    for title, table in _tables(made):
        drawn = RichTable(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
        widths = _least_widths(table)
        for place, (heading, width) in enumerate(zip(table.headings, widths)):
            drawn.add_column(Text(heading), justify="right" if place else "left", overflow="fold", min_width=width)
        for row in table.rows:
            drawn.add_row(*(Text(cell) for cell in row))
        needed = sum(widths) + 3 * len(widths) + 2
        if needed <= console.width:
            console.print(drawn)
        else:  # wider than the terminal
            console.print(drawn, width=needed, crop=False, soft_wrap=True)
    for line in _footnotes(made):
        console.print(Text(line, style="dim"))
    for note in made.notes:
        console.print(Text(f"Note: {note}", style="yellow"), soft_wrap=True)
    for path in made.paths:
        console.print(Text(f"Written: {path}"), soft_wrap=True)  # unbroken, so that it can be copied


def _least_widths(table: Table) -> list[int]:
    """The least width of each column: headings and long names may wrap, but a wrapped number would read as another."""
    widths = [max(len(row[column]) for row in table.rows) for column in range(len(table.headings))]
    widths = [max(width, min(10, len(heading))) for width, heading in zip(widths, table.headings)]
    return [min(widths[0], 24), *widths[1:]]


def _print_plain(made: Report) -> None:
    for title, table in _tables(made):
        print(f"{title}\n")
        for line in aligned([table.headings, *table.rows], names_first=True):
            print(line)
        print()
    for line in _footnotes(made):
        print(line)
    for note in made.notes:
        print(f"Note: {note}")
    for path in made.paths:
        print(f"Written: {path}")


__all__ = ["main", "parser"]
