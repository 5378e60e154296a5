"""Tables of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, names_first: bool = False) -> list[str]:
    """Lines with the cells of each column below each other, two spaces apart, to the right.

    Args:
        rows: Cells, as many in each row.
        names_first: Whether the first column is of names, which stand to the left.
    """
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        if names_first:
            cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return lines


__all__ = ["aligned"]
