"""Replicas of the stages: what keeps the processes that hold the same stage alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_sg._compat import prepare_for_backward, tree_flatten, tree_map_only, tree_unflatten


class Replicas:
    """The processes that hold the same stages in different replicas of the model; by default only this one.

    Args:
        count: The number of replicas.
        index: Which this process is of, from 0.
        group: The process group of those with the same stages, for tensors on their device.
        host_group: The same for tensors on the host.
    """

    def __init__(self, count: int = 1, index: int = 0, group: Any = None, host_group: Any = None) -> None:
        self.count = count
        self.index = index
        self.group = group
        self.host_group = host_group

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean over the replicas of each of these floating-point tensors. A collective."""
        if self.count == 1 or not tensors:
            return list(tensors)
        averaged: list[Tensor] = [tensor.detach() for tensor in tensors]
        kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in averaged)
        for kind in kinds:
            places = [place for place, tensor in enumerate(averaged) if (tensor.dtype, tensor.device) == kind]
            flat = torch.cat([averaged[place].reshape(-1) for place in places])
            dist.all_reduce(flat, group=self.group)
            parts = (flat / self.count).split([averaged[place].numel() for place in places])
            for place, part in zip(places, parts):
                averaged[place] = part.view(averaged[place].shape)
        return averaged

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Puts the mean over the replicas in the place of each of these. A collective."""
        if self.count > 1:
            with torch.no_grad():
                for tensor, mean in zip(tensors, self.average(tensors)):
                    tensor.copy_(mean)

    def any(self, wish: bool) -> bool:
        """Whether any replica says yes. A collective."""
        if self.count == 1:
            return wish
        votes = torch.tensor(int(wish))
        dist.all_reduce(votes, group=self.host_group)
        return bool(votes)

    def join(self, batches: list[dict[str, Any]], samples: Callable[[dict[str, Any]], int]) -> list[dict[str, Any]]:
        """Puts the samples of all replicas together, for a checkpoint. A collective.

        Args:
            batches: Of each batch, tensors on the host in any nesting, most of them ``(N, ...)``.
            samples: The number of samples N of a batch.

        Returns:
            The batches with these tensors put together; a batch whose tensors have other sizes behind the samples in
            other replicas is replica 0's alone.
        """
        if self.count == 1:
            return batches
        every: list[list[dict[str, Any]]] = [[] for _ in range(self.count)]
        dist.all_gather_object(every, batches, group=self.host_group)
        return [_joined(list(parts), samples) for parts in zip(*every)]

    def share(self, batches: list[dict[str, Any]], samples: Callable[[dict[str, Any]], int]) -> list[dict[str, Any]]:
        """This replica's part of what :meth:`join` put together, by however many replicas it was saved."""

        def part(batch: dict[str, Any]) -> Any:
            count = samples(batch)
            if count < self.count:
                return batch  # too few for all: everyone has them
            return tree_map_only(
                Tensor,
                lambda tensor: tensor.tensor_split(self.count)[self.index] if _has(tensor, count) else tensor,
                batch,
            )

        return batches if self.count == 1 else [part(batch) for batch in batches]


def _joined(parts: list[dict[str, Any]], samples: Callable[[dict[str, Any]], int]) -> dict[str, Any]:
    leaves, structure = tree_flatten(parts[0])
    others = [tree_flatten(part)[0] for part in parts]
    counts = [samples(part) for part in parts]
    together = []
    for place, first in enumerate(leaves):
        if not _has(first, counts[0]):
            together.append(first)
            continue
        same = [other[place] for other in others if len(other) == len(leaves)]
        fits = [_has(each, n) and each.shape[1:] == first.shape[1:] for each, n in zip(same, counts)]
        if len(fits) < len(parts) or not all(fits):
            return parts[0]
        together.append(torch.cat(same))
    joined: dict[str, Any] = tree_unflatten(together, structure)
    return joined


def _has(leaf: Any, count: int) -> bool:
    """Whether a leaf is a tensor with so many samples first."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == count


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


__all__ = ["Replicas", "ReplicatedStages"]
