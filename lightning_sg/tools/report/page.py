"""The report as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from lightning_sg.tools.report.compare import BoundaryMetric, Row
from lightning_sg.tools.report.picture import Picture
from lightning_sg.tools.report.run import Run
from lightning_sg.tools.report.tables import Table, boundary_table, value_table

PAGE = "report.html"

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 1120px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #e2e2e2; text-align: right; }
th { vertical-align: bottom; border-bottom-color: #888; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
.paths td { text-align: left; overflow-wrap: anywhere; }
figure { margin: 0; } img { max-width: 100%; height: auto; }
figcaption, .small { color: #555; font-size: .9rem; max-width: 62rem; }
.notes { background: #fff7e0; border-left: 4px solid #e69f00; padding: .6rem 1rem; overflow-wrap: anywhere; }
.notes ul { margin: 0; padding-left: 1.1rem; }
"""


_BOUNDARIES = (
    "For each metric: its final value, which is the median of the last tenth of what was logged (the last value, if it "
    "was logged rarely), and its median over the whole run. Cost: the predictor's FLOPs per step as a share of the "
    "whole model's. Guarded: the share of logged steps at which the guard had taken over."
)


def page(
    run: Run,
    baselines: Sequence[Run],
    rows: Sequence[Row],
    boundaries: Mapping[str, Mapping[str, BoundaryMetric]],
    notes: Sequence[str],
    pictures: Sequence[Picture],
    title: str | None = None,
) -> str:
    """Builds the page.

    Args:
        run: The run.
        baselines: Its baselines.
        rows: Their final values.
        boundaries: The metrics of each boundary.
        notes: What the reader must know.
        pictures: The pictures, which are embedded in the page.
        title: The page's title; by default it names the run.

    Returns:
        HTML.
    """
    heading = escape(title or f"Synthetic gradients: {run.label}")
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_CSS}</style></head><body>",
        f"<h1>{heading}</h1>",
        _runs(run, baselines),
    ]
    if notes:
        parts.append(_notes(notes))
    if rows:
        parts += ["<h2>Final values</h2>", _table(value_table(run, baselines, rows)), _small(_explain(rows))]
    parts += [_figure(picture) for picture in pictures]
    if boundaries:
        parts += ["<h2>Each boundary</h2>", _table(boundary_table(boundaries)), _small(_BOUNDARIES)]
    return "\n".join([*parts, "</body></html>", ""])


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<div class="notes"><ul>{items}</ul></div>'


def _explain(rows: Sequence[Row]) -> str:
    text = "The last logged values. "
    if any(row.smoothed for row in rows):
        text += "With *: the median of the last tenth of the values, because single batches are noisy. "
    if any(row.differences for row in rows):
        text += "Difference: the run minus the baseline; one pair of seeds says little about a small difference."
    return text


def _runs(run: Run, baselines: Sequence[Run]) -> str:
    lines = []
    for role, each in [("run", run), *(("baseline", baseline) for baseline in baselines)]:
        extent = f"{each.last_step} steps" + (f", {each.epochs} epochs" if each.epochs else "")
        lines.append([role, each.label, str(each.path), extent])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<table class="paths"><tbody>{body}</tbody></table>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in table.headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(picture: Picture) -> str:
    image = base64.b64encode(picture.png).decode("ascii")
    return (
        f"<h2>{escape(picture.title)}</h2>\n"
        f'<figure><img alt="{escape(picture.title)}" src="data:image/png;base64,{image}">\n'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _small(text: str) -> str:
    return f'<p class="small">{escape(text)}</p>'


__all__ = ["PAGE", "page"]
