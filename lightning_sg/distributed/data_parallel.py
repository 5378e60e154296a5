"""Averages the gradients of the stages of this process over the replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_sg._compat import prepare_for_backward
from lightning_sg.replicas import Replicas


class DataParallel(Protocol):
    """Runs training steps and has their backward passes average gradients.

    Attributes:
        averages: Whether there is anything to average.
    """

    averages: bool

    def run(self, step: Callable[[], Any]) -> Any:
        """Runs the forward pass of a training step."""

    def prepare(self, loss: Tensor) -> None:
        """Has the backward pass from ``loss`` that comes next average the gradients, unless they are accumulated."""

    @property
    def accumulates(self) -> bool:
        """Whether the backward pass that comes leaves the gradients to each replica."""

    def accumulating(self) -> AbstractContextManager[None]:
        """While entered, gradients stay each replica's own: a later backward pass averages their sum."""


class NoReplicas:
    """There is one replica: nothing is averaged."""

    averages = False
    accumulates = True

    def run(self, step: Callable[[], Any]) -> Any:
        """Runs the step."""
        return step()

    def prepare(self, loss: Tensor) -> None:
        """Does nothing."""

    def accumulating(self) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()


class _OwnTensors(nn.Module):
    """The parameters and buffers of this process's stages as one module, whose forward is the user's step."""

    def __init__(self, module: nn.Module, holds: Callable[[str], bool]) -> None:
        super().__init__()
        for name, parameter in module.named_parameters():
            if holds(name):
                self.register_parameter(name.replace(".", "/"), parameter)
        for name, buffer in module.named_buffers():
            if holds(name):
                self.register_buffer(name.replace(".", "/"), buffer)

    def refresh(self, module: nn.Module) -> None:
        """Takes in buffers that the user's code has replaced, as DDP does before it sends them."""
        for name, buffer in module.named_buffers() if self._buffers else ():
            if name.replace(".", "/") in self._buffers:
                self._buffers[name.replace(".", "/")] = buffer

    def forward(self, step: Callable[[], Any]) -> Any:
        return step()


class ReplicatedStages:
    """Has torch's ``DistributedDataParallel`` average the gradients of this process's stages over the replicas.

    It goes by the parameters alone, in buckets, while the backward pass is still going on. Buffers, such as BatchNorm's
    running statistics, are replica 0's, as DDP has it.

    Args:
        module: The user's module.
        holds: Whether this process trains the parameter, or keeps the buffer, of that name.
        replicas: The processes with the same stages.
        options: Arguments for ``DistributedDataParallel``.
    """

    averages = True

    def __init__(
        self, module: nn.Module, holds: Callable[[str], bool], replicas: Replicas, options: dict[str, Any]
    ) -> None:
        self._module = module
        self._tensors = _OwnTensors(module, holds)
        self._replicas = replicas
        self._options = options
        self._trainable: list[bool] = []
        self._ddp: DistributedDataParallel | None = None
        self._accumulating = False

    def run(self, step: Callable[[], Any]) -> Any:
        """Runs the forward pass of a training step."""
        trainable = [parameter.requires_grad for parameter in self._tensors.parameters()]
        if trainable != self._trainable:  # at the first step, and when a callback freezes or thaws layers
            self._trainable = trainable
            self._ddp = None
            if any(trainable):
                self._ddp = DistributedDataParallel(self._tensors, process_group=self._replicas.group, **self._options)
        if self._ddp is None:
            return step()
        self._tensors.refresh(self._module)
        # What goes backward is known only later, by hand still within the step: it may be no loss of this step's.
        self._ddp.require_backward_grad_sync = False
        return self._ddp(step)

    def prepare(self, loss: Tensor) -> None:
        """Has the backward pass from ``loss`` that comes next average the gradients, unless they are accumulated."""
        if self._ddp is None or self._accumulating or loss.grad_fn is None:
            return
        self._ddp.require_backward_grad_sync = True
        prepare_for_backward(self._ddp, loss)
        self._ddp.require_backward_grad_sync = False

    @property
    def accumulates(self) -> bool:
        """Whether the backward pass that comes leaves the gradients to each replica."""
        return self._accumulating

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """While entered, gradients stay each replica's own: a later backward pass averages their sum."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False


__all__ = ["DataParallel", "NoReplicas", "ReplicatedStages"]
