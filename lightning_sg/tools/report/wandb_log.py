"""Reads the folder that Weights & Biases keeps of a run on disk, offline runs too, if wandb is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_sg.tools.report.run import ReportError

#: The column in which Lightning's WandbLogger has the training step.
STEP = "trainer/global_step"

# The file is a log in the format of LevelDB, behind a header of its own: blocks of records, each with a checksum, a
# length and a kind. https://github.com/google/leveldb/blob/main/doc/log_format.md
_HEADER, _BLOCK, _RECORD = 7, 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def log_in(folder: Path) -> Path | None:
    """The log of a run in its folder (``offline-run-...``), or of the newest run in a folder of them."""
    found = [*folder.glob("run-*.wandb"), *folder.glob("*run-*/run-*.wandb"), *folder.glob("wandb/*run-*/run-*.wandb")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def read_wandb(path: Path) -> tuple[dict[str, dict[int, float]], dict[int, float]]:
    """Reads what a run has logged.

    Args:
        path: The file ``run-*.wandb``.

    Returns:
        Values by name and training step, and when the first value of each step was logged, in seconds.

    Raises:
        ReportError: If wandb is not installed, or the file is none of its logs.
    """
    try:
        messages: Any = import_module("wandb.proto.wandb_internal_pb2")  # its classes are made when it is imported
    except ImportError as error:
        raise ReportError(f"{path} is a log of Weights & Biases. To read it: pip install wandb.") from error
    points: dict[str, dict[int, float]] = {}
    clock: dict[int, float] = {}
    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ReportError(f"{path} is damaged, or not a log of Weights & Biases.")
    for content in _records(data):
        record = messages.Record()
        record.ParseFromString(content)
        if not record.HasField("history"):
            continue
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        media = {name.removesuffix("_type") for name in row if name.endswith("/_type")}  # pictures and tables
        row = {name: value for name, value in row.items() if not name.startswith(tuple(media))}
        step = row.get(STEP, row.get("_step"))
        if step is not None and "_timestamp" in row:
            clock.setdefault(int(step), float(row["_timestamp"]))
        for name, value in row.items():
            own = not name.startswith("_") and name != STEP
            if step is not None and own and isinstance(value, (int, float)) and not isinstance(value, bool):
                points.setdefault(name, {})[int(step)] = float(value)
    return points, clock


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a log, as far as they are whole: a run that was killed leaves a part of one."""
    place, parts = _HEADER, b""
    while place + _RECORD <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _RECORD:  # too short for a record: padding
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        content = data[place + _RECORD : place + _RECORD + length]
        if len(content) < length or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        place += _RECORD + length
        parts = content if kind in (_FULL, _FIRST) else parts + content
        if kind in (_FULL, _LAST):
            yield parts


__all__ = ["STEP", "log_in", "read_wandb"]
