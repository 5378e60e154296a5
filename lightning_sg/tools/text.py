"""Text tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, names_first: bool = False) -> list[str]:
    """Formats rows as lines with aligned columns, two spaces apart. Cells are right-aligned.

    Args:
        rows: The cells; every row has the same number.
        names_first: Left-align the first column.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        if names_first:
            cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return lines


__all__ = ["aligned"]
