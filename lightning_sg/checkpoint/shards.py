"""Reads a folder of shards: finds its values, checks its files, and loads the values one by one."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_sg.checkpoint.checksums import IN_FOLDER, check, read_checksums
from lightning_sg.checkpoint.index import METADATA, Entry, read_index
from lightning_sg.checkpoint.torch_file import damaged, load_file
from lightning_sg.errors import CheckpointError
from lightning_sg.files import local_path

#: The file with everything that is in no shard; by it a folder of shards is known.
REST = "rest.pt"
#: The folder of one process, before its place among the processes of a replica, in the order of the data.
PROCESS = "process-"


def is_sharded(path: str | Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    local = local_path(path)
    return local is not None and (local / REST).is_file()


class Shards:
    """The values in a folder of shards.

    Every file is compared with its checksum before the first value is taken from it. In the form of earlier versions,
    all shards are in the folder itself, under one ``.metadata``, and there are no checksums.

    Attributes:
        path: The folder.

    Args:
        path: The folder.
        weights_only: Whether to refuse all but tensors and plain values.
    """

    def __init__(self, path: Path, weights_only: bool = True) -> None:
        self.path = path
        self._weights_only = weights_only
        self._checked: set[Path] = set()

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Where the values are, by name.

        Raises:
            CheckpointError: If a file that says so is missing, damaged or refused.
        """
        folders = [self.path] if (self.path / METADATA).is_file() else self._folders()
        if not folders:
            raise CheckpointError(f"{self.path} has no shards: no {METADATA} in it, nor in a folder {PROCESS}0.")
        for name in self._checksums:
            if not (self.path / name).is_file():
                raise CheckpointError(f"{self.path / name} is missing: the checkpoint was copied in part.")
        entries: dict[str, Entry] = {}
        for folder in folders:
            self._check(folder / METADATA)
            entries = read_index(folder, self._weights_only) | entries
        return dict(sorted(entries.items(), key=lambda item: folders.index(item[1].file.parent)))

    def _folders(self) -> list[Path]:
        found = [each for each in self.path.glob(f"{PROCESS}*") if each.name.removeprefix(PROCESS).isdigit()]
        return sorted(found, key=lambda each: int(each.name.removeprefix(PROCESS)))

    def rest(self) -> dict[str, Any]:
        """Everything that is in no shard.

        Raises:
            CheckpointError: If it is damaged or refused.
        """
        self._check(self.path / REST)
        rest: dict[str, Any] = load_file(self.path / REST, self.path / REST, self._weights_only)
        return rest

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Loads values one by one, file by file.

        Raises:
            CheckpointError: If a file is damaged, or has something in it that could run code.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        for file, within in by_file.items():
            self._check(file)
            try:
                stream = file.open("rb")
            except OSError as error:
                raise damaged(file, error) from error
            with stream:
                for name in within:
                    yield name, self._load(stream, self.entries[name], f"{name} in {file}")

    def _load(self, stream: io.BufferedReader, entry: Entry, name: str) -> Any:
        stream.seek(entry.offset)
        value = load_file(io.BytesIO(stream.read(entry.length)), name, self._weights_only)
        if entry.shape is not None and (not isinstance(value, Tensor) or tuple(value.shape) != entry.shape):
            raise CheckpointError(f"{name} is not the tensor of shape {entry.shape} that {METADATA} says it is.")
        return value

    @cached_property
    def _checksums(self) -> dict[str, str]:
        path = self.path / IN_FOLDER
        return read_checksums(path) if path.is_file() else {}

    def _check(self, file: Path) -> None:
        expected = self._checksums.get(file.relative_to(self.path).as_posix())
        if expected is not None and file not in self._checked:
            check(file, expected, self.path / IN_FOLDER)
        self._checked.add(file)


__all__ = ["PROCESS", "REST", "Shards", "is_sharded"]
