"""The checkpoint plugin: writes one file atomically with a checksum beside it, and loads it without running code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_sg.checkpoint.checksums import beside, check_whole, write_checksums
from lightning_sg.checkpoint.shards import REST, is_sharded
from lightning_sg.checkpoint.torch_file import load_file, save_file
from lightning_sg.errors import CheckpointError
from lightning_sg.files import local_path, replace, sync_folder
from lightning_sg.lightning_api import TorchCheckpointIO, get_filesystem


def save_whole(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint and its checksum.

    At no time is there a checkpoint with the checksum of another: the old checksum goes first, the new one comes last.

    Args:
        checkpoint: As Lightning has it.
        path: The file. A folder of shards of that name is replaced too.

    Raises:
        OSError: If the disk is full or fails; the checkpoint before stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    checksum = save_file(checkpoint, path, _publish)
    write_checksums(beside(path), [(path.name, checksum)])


def _publish(new: Path, path: Path) -> None:
    beside(path).unlink(missing_ok=True)
    sync_folder(path.parent)
    if is_sharded(path):
        replace(new, path)
    else:
        new.replace(path)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the one of the same name and puts it in its place; loads plain values only.

    Lightning's own writes into ``TMPDIR`` and moves the file, which copies it where that is another file system.
    :class:`~lightning_sg.SyntheticGradientStrategy` uses this one by default. For any other strategy, pass
    ``Trainer(plugins=[AtomicCheckpointIO()])``. It leaves writing to a remote path (``s3://...``) to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint and, for a local path, its checksum.

        Args:
            checkpoint: As Lightning has it.
            path: The file.
            storage_options: Must be ``None``.

        Raises:
            TypeError: For ``storage_options``.
            OSError: If the disk is full or fails; the checkpoint before stays as it was.
        """
        local = local_path(path)
        if storage_options is not None or local is None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_whole(checkpoint, local)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = lambda storage, _location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Loads a checkpoint, for a local path after a look at its checksum.

        Args:
            path: The file.
            map_location: As for ``torch.load``.
            weights_only: Whether to refuse all but tensors and plain values; by default, yes.

        Raises:
            FileNotFoundError: If it is not there.
            CheckpointError: If it is damaged, or has something in it that could run code.
        """
        weights_only = weights_only in (None, True)
        local = local_path(path)
        checkpoint: dict[str, Any]
        if local is None:
            with get_filesystem(path).open(str(path), "rb") as file:
                checkpoint = load_file(file, path, weights_only, map_location)
            return checkpoint
        if local.is_dir():
            raise CheckpointError(f"{path} is a folder without {REST}: neither one file nor a checkpoint in shards.")
        if not local.is_file():
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        check_whole(local)
        checkpoint = load_file(local, path, weights_only, map_location)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint and its checksum."""
        super().remove_checkpoint(path)
        local = local_path(path)
        if local is not None:
            beside(local).unlink(missing_ok=True)


def with_default(plugin: Any) -> Any:
    """The user's checkpoint plugin, with :class:`AtomicCheckpointIO` where it leaves open how files are written."""
    if plugin is None:
        return AtomicCheckpointIO()
    inner = plugin
    while hasattr(inner, "checkpoint_io"):  # wraps another, such as AsyncCheckpointIO
        if inner.checkpoint_io is None:
            inner.checkpoint_io = AtomicCheckpointIO()
        inner = inner.checkpoint_io
    return plugin


__all__ = ["AtomicCheckpointIO", "save_whole", "with_default"]
