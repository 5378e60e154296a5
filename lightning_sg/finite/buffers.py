"""Keeps a module's buffers as they were before a batch, such as BatchNorm's running statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg.partition.fakes import is_fake

_SMALL = 1024  # values: a copy takes no longer than to think about it


@dataclass
class _Kept:
    """A buffer and what it was.

    Attributes:
        tensor: The buffer.
        version: How often it had been changed in place.
        copy: Its values then.
    """

    tensor: Tensor
    version: int
    copy: Tensor

    def may_differ(self, key: str) -> bool:
        """Whether the buffer may have changed since; BatchNorm changes its own without counting that."""
        return self.version != self.tensor._version or key.startswith("running_") or self.copy.numel() <= _SMALL


class BuffersBefore:
    """Copies of buffers, renewed only where a buffer has changed.

    Args:
        module: The module.
        floating: Whether only those that can be NaN are kept.
    """

    def __init__(self, module: nn.Module, *, floating: bool = False) -> None:
        self._module = module
        self._floating = floating
        self._places: list[tuple[str, dict[str, Any], str]] | None = None
        self._kept: dict[str, _Kept] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """A batch begins."""
        if self._places is None:  # found once: a walk through a large module takes longer than the copies
            self._places = [
                (f"{prefix}.{key}" if prefix else key, child._buffers, key)
                for prefix, child in self._module.named_modules()
                for key, buffer in child._buffers.items()
                if not self._floating or buffer is None or buffer.is_floating_point()
            ]
        renewed: list[_Kept] = []
        for name, owner, key in self._places:
            tensor, kept = owner.get(key), self._kept.get(name)
            if kept is not None and kept.tensor is tensor and kept.copy.shape == tensor.shape:
                if kept.may_differ(key):
                    kept.version = tensor._version
                    renewed.append(kept)
            elif tensor is None or is_fake(tensor) or tensor.is_meta:
                self._kept.pop(name, None)
            else:
                self._kept[name] = _Kept(tensor, tensor._version, tensor.detach().clone())
        if renewed:  # all by one operation
            torch._foreach_copy_([kept.copy for kept in renewed], [kept.tensor for kept in renewed])

    @torch.no_grad()
    def restore(self, wanted: Callable[[str, Tensor], bool]) -> None:
        """Takes back what the batch did.

        Args:
            wanted: Whether a buffer is to be restored, by its name and its values.
        """
        for name, owner, key in self._places or ():
            kept, tensor = self._kept.get(name), owner.get(key)
            if kept is None or tensor is None or is_fake(tensor) or not wanted(name, tensor):
                continue
            if tensor is kept.tensor and tensor.shape == kept.copy.shape:
                if kept.may_differ(key):
                    tensor.copy_(kept.copy)
                    kept.version = tensor._version
            else:
                owner[key] = kept.copy.clone()


__all__ = ["BuffersBefore"]
