"""Makes runs to report on, and checks the files of a report."""

from __future__ import annotations

import base64
import csv
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

from lightning_sg.tools.report.run import METRICS

# Boundary names that HTML, rich or matplotlib could trip over.
ODD = ["a<b>&c", "_orig_mod.net.2", "no $\\frac{$ formula", "[red]x[/red]", "néttö\nα", "x" * 80, "d/e"]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """Writes a metrics.csv as CSVLogger does: columns sorted, cells empty where nothing was logged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_run(
    folder: Path, boundaries: list[str] = (), steps: int = 60, loss: float = 1.0, keys: tuple[str, ...] = ()
) -> Path:
    """Makes a run of three epochs that logs every metric of its boundaries, or only ``keys``, at each step."""
    rows: list[dict[str, object]] = []
    for step in range(steps):
        row: dict[str, object] = {"step": step, "epoch": step * 3 // steps, "train_loss": loss + 1 / (1 + step)}
        for place, name in enumerate(boundaries):
            metrics = {
                "cosine": 0.5 + 0.01 * place,
                "norm_ratio": 0.1 * (step + 1),
                "bias": 0.02 * (place + 1),
                "variance": 0.5 if step else 0.0,
                "loss": 2.0,
                "cost": 0.25,
                "guarded": float(step < 15 and place == 0),
                "something_new": step,
            }
            if step % 10 == 0:
                metrics["bootstrapped_cosine"] = 0.9
            row |= {f"sg/{name}/{key}": value for key, value in metrics.items() if not keys or key in keys}
        rows.append(row)
        if step % 20 == 19:
            rows.append({"step": step, "epoch": step * 3 // steps, "val_loss": loss + 10 / (1 + step)})
    write(folder / METRICS, rows)
    return folder


def size_of_png(content: bytes) -> tuple[int, int]:
    """The width and height of a PNG; fails unless every chunk is intact."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, data = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + data) == struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0]
        kinds.append(kind)
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


class Checked(HTMLParser):
    """Parses a page and collects its texts, images and tags; fails unless every tag is closed."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.images: list[bytes] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            source = dict(attrs)["src"] or ""
            assert source.startswith("data:image/png;base64,")
            self.images.append(base64.b64decode(source.split(",", 1)[1], validate=True))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
