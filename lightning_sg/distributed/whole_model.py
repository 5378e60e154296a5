"""Gives the user's hooks the whole current model, and takes over what they write to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from zlib import crc32

import torch
from torch import Tensor

from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.lightning_api import pl
from lightning_sg.partition.replaced import named_tensors

_log = logging.getLogger(__name__)


class WholeModel:
    """The whole model in every process, while hooks of the user's run between steps.

    Each process trains the weights of its own stages, and has old values of the others. Where the processes meet
    anyway, at the end of an epoch and around validation, hooks may look at all of them.

    Args:
        runtime: This process's part of the run.
        gather: Makes the module whole in every process. A collective.
    """

    def __init__(self, runtime: StageRuntime, gather: Callable[[], None]) -> None:
        self._runtime = runtime
        self._gather = gather
        self._current = False
        self._digests: dict[str, int] = {}
        self._on_device: list[tuple[Tensor, Tensor]] = []  # tensors of other stages, each with its place on the host

    def trained(self) -> None:
        """A training step has changed the weights of all stages."""
        self._current = False
        self._leave_device()

    def bring(self, module: pl.LightningModule) -> None:
        """Makes the module whole, unless it is. A collective.

        Args:
            module: The module.
        """
        placement = self._runtime.ownership.placement
        if placement is None:
            return
        if not self._current:
            self._leave_device()
            self._gather()
            self._digests = _digests(module)
            self._current = True
        if not self._on_device:
            self._take_to_device(module)

    def _take_to_device(self, module: pl.LightningModule) -> None:
        """Has the tensors of other stages where this process's are: a hook may call the whole module."""
        device = self._runtime.grid.device
        if device.type == "cpu":
            return
        try:
            for tensor in named_tensors(module).values():
                if tensor.device != device:
                    host, tensor.data = tensor.data, tensor.data.to(device)
                    self._on_device.append((tensor, host))
        except torch.OutOfMemoryError:
            self._leave_device()
            _log.warning(
                "%s: the whole model does not fit onto %s beside its own stages. Hooks see the weights of other stages "
                "on the host.",
                self._runtime.status.name,
                device,
            )

    def _leave_device(self) -> None:
        for tensor, host in self._on_device:
            host.copy_(tensor.data)
            tensor.data = host
        self._on_device.clear()

    def take_writes(self, module: pl.LightningModule, hook: str) -> None:
        """Gives the owners what a hook has written in another process. A collective.

        Where every process runs a hook alike, the owners have written the same themselves.

        Args:
            module: The module.
            hook: The name of the hook.
        """
        placement = self._runtime.ownership.placement
        if not self._current or placement is None:
            return
        now = _digests(module)
        own = [name for name, digest in now.items() if digest != self._digests.get(name)]
        written = [set(names) for names in self._runtime.meetings.gather(f"what {hook} has written", own)]
        self._digests = now
        writers = {}
        for name in now:
            owner = placement.owner.get(name, placement.processes - 1)
            writer = max((place for place, names in enumerate(written) if name in names), default=owner)
            if name not in written[owner] and writer != owner:
                writers[name] = writer
        if writers:
            self._spread(module, writers, hook)
        self._leave_device()

    def _spread(self, module: pl.LightningModule, writers: dict[str, int], hook: str) -> None:
        tensors, what = named_tensors(module), f"sharing what {hook} has written"
        with self._runtime.status.meeting(what):
            self._runtime.chain.spread(what, {name: (tensors[name], writer) for name, writer in writers.items()})
        self._digests |= _digests(module, writers)


def _digests(module: pl.LightningModule, names: Iterable[str] | None = None) -> dict[str, int]:
    """A number for the values of each parameter and buffer, or of some; ``tensor.data`` changes no version."""
    wanted = None if names is None else set(names)
    tensors = named_tensors(module).items()
    return {name: _digest(tensor) for name, tensor in tensors if wanted is None or name in wanted}


def _digest(tensor: Tensor) -> int:
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return crc32(values.view(torch.uint8).numpy().data) if values.numel() else 0


__all__ = ["WholeModel"]
