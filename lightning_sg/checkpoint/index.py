"""Reads ``.metadata``, a pickle of ``torch.distributed.checkpoint``, without running code that may be in it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from lightning_sg.checkpoint.torch_file import damaged, refused

METADATA = ".metadata"

#: The classes in an honest file, by module. Each is read as a record without behaviour.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
}


@dataclass(frozen=True)
class Entry:
    """Where a value is in a folder of shards.

    Attributes:
        file: The file.
        offset: Where it begins there, in bytes.
        length: Its bytes.
        shape: Of a tensor; ``None`` for anything else.
    """

    file: Path
    offset: int
    length: int
    shape: tuple[int, ...] | None


def read_index(folder: Path, weights_only: bool = True) -> dict[str, Entry]:
    """Where the values of one ``.metadata`` are, by name.

    Args:
        folder: The folder with that file.
        weights_only: Whether to refuse a file that names a class which does not belong there. Otherwise that class is
            ignored; either way nothing runs.

    Raises:
        CheckpointError: If the file has something else in it, or is damaged.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file, weights_only).load()
        return _entries(metadata, folder)
    except _UnknownClass as error:
        raise refused(path, str(error)) from None
    except FileNotFoundError:
        raise
    except Exception as error:
        raise damaged(path, error) from error


def _entries(metadata: Any, folder: Path) -> dict[str, Entry]:
    shapes = {name: _shape(each) for name, each in metadata.state_dict_metadata.items()}
    entries: dict[str, Entry] = {}
    for index, info in metadata.storage_data.items():
        name, file = str(index.fqn), str(info.relative_path)
        if Path(file).name != file:
            raise ValueError(f"{name} would be in {file}, outside the folder")
        if name in entries:
            raise ValueError(f"{name} is in several pieces")
        entries[name] = Entry(folder / file, int(info.offset), int(info.length), shapes[name])
    if entries.keys() != shapes.keys():
        raise ValueError("it does not say where every tensor is")
    return entries


def _shape(entry: Any) -> tuple[int, ...] | None:
    return tuple(int(size) for size in entry.size) if type(entry).__name__ == "TensorStorageMetadata" else None


class _UnknownClass(pickle.UnpicklingError):
    """A pickle names something that does not belong into this file."""


class _Record:
    """Has the values of an object of another class, and none of its behaviour."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.values = state


class _Unpickler(pickle.Unpickler):
    """Makes nothing but records, shapes and dtypes.

    Args:
        file: The pickle.
        strict: Whether to refuse names that do not belong there.
    """

    def __init__(self, file: IO[bytes], strict: bool) -> None:
        super().__init__(file)
        self._strict = strict

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """What a name in the pickle stands for; the class of that name is never looked up."""
        if (module, name) == ("torch", "Size"):
            return tuple
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype  # type: ignore[return-value]  # not called: it stands for itself
        if self._strict and name not in _RECORDS.get(module, ()):
            raise _UnknownClass(f"{module}.{name}")
        return type(name, (_Record,), {})


__all__ = ["METADATA", "Entry", "read_index"]
