"""Notes in a trace which stage a layer is in that no traced step has gone through, once a batch does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_sg.boundary import Site
from lightning_sg.partition.trace import Trace


class LateLayers:
    """Waits for a training batch to go through the layers that the trace knows no stage of.

    Args:
        module: The LightningModule.
        found: Called when the trace has been added to.
    """

    def __init__(self, module: nn.Module, found: Callable[[], None]) -> None:
        self._module = module
        self._found = found
        self._handles: list[RemovableHandle] = []

    def watch(self, trace: Trace, sites: Sequence[Site]) -> None:
        """Watches the layers with parameters that the trace has not seen used.

        Args:
            trace: A traced training step, which is added to.
            sites: The boundaries.
        """
        self.remove()
        if not trace.order:
            return
        for prefix, child in self._module.named_modules():
            own = [f"{prefix}.{name}" for name, _parameter in child.named_parameters(recurse=False)]
            unseen = [name for name in own if name not in trace.uses]
            if prefix and unseen:
                noting = _Noting(unseen, trace, sites, self._found)
                noting.handle = child.register_forward_pre_hook(noting)
                self._handles.append(noting.handle)

    def remove(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Noting:
    """A hook of one layer. As a class it can be copied and pickled with the module; the copy does nothing."""

    handle: RemovableHandle | None = None

    def __init__(self, names: list[str], trace: Trace, sites: Sequence[Site], found: Callable[[], None]) -> None:
        self._names = names
        self._trace = trace
        self._sites = sites
        self._found = found

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        if self.handle is None or not torch.is_grad_enabled() or not any(site.is_open for site in self._sites):
            return
        stage = sum(site.crossed for site in self._sites)
        for name in self._names:
            self._trace.uses.setdefault(name, set()).add(stage)
        self.handle.remove()
        self._found()

    def __reduce__(self) -> tuple[type[_Noting], tuple[list[str], Trace, list[Site], Callable[[], None]]]:
        return _Noting, ([], Trace(), [], _nothing)


def _nothing() -> None:
    pass


__all__ = ["LateLayers"]
