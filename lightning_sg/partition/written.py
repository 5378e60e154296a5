"""Puts back what a step writes into tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sg._compat import TorchDispatchMode, tree_leaves
from lightning_sg.partition.fakes import is_fake

#: Operations that write to their arguments without saying so, and the arguments.
_UNSAID = ("running_mean", "running_var")


class Written(TorchDispatchMode):
    """Sees every operation, and copies real tensors before they are written to, wherever the user keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._known: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _written_by(func, args, kwargs):
            self._keep(tensor)
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Gives the tensors their values back, those that were written to last first."""
        with torch.no_grad():
            for tensor, before in reversed(self._kept):
                with torch.inference_mode(tensor.is_inference()):
                    if tensor.shape == before.shape:
                        tensor.copy_(before)
                    else:
                        tensor.data = before
        self._kept.clear()

    def _keep(self, tensor: Tensor) -> None:
        if is_fake(tensor) or tensor.layout != torch.strided or tensor.is_meta:
            return
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if place not in self._known:
            self._known.add(place)
            self._kept.append((tensor.detach(), tensor.detach().clone()))


def _written_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    arguments = func._schema.arguments
    for place, argument in enumerate(arguments):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes or argument.name in _UNSAID:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))


__all__ = ["Written"]
