"""The processes that hold the same stages in other replicas, and what they do together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sg._compat import tree_flatten, tree_map_only, tree_unflatten
from lightning_sg.objects import pack, unpack


class Replicas:
    """The processes that hold the same stages in different replicas of the model; by default, only this one.

    Args:
        count: The number of replicas.
        index: The replica of this process, from 0.
        group: The process group of those with the same stages, for tensors on their device.
        host_group: The same for tensors on the host.
    """

    def __init__(self, count: int = 1, index: int = 0, group: Any = None, host_group: Any = None) -> None:
        self.count = count
        self.index = index
        self.group = group
        self.host_group = host_group

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each floating-point tensor over the replicas. A collective."""
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
        """Replaces each tensor by its mean over the replicas. A collective."""
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

    def gather(self, value: Any) -> list[Any]:
        """What each replica has, in their order. A collective.

        Args:
            value: See :func:`~lightning_sg.objects.pack`.
        """
        if self.count == 1:
            return [value]
        own = pack(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([own.numel()]), group=self.host_group)
        room = max(int(size) for size in sizes)
        every = [torch.empty(room, dtype=torch.uint8) for _ in range(self.count)]
        dist.all_gather(every, torch.nn.functional.pad(own, (0, room - own.numel())), group=self.host_group)
        return [
            value if index == self.index else unpack(packed[: int(size)])
            for index, (packed, size) in enumerate(zip(every, sizes))
        ]

    def broadcast(self, value: Any, source: int) -> Any:
        """What the replica ``source`` has. A collective.

        Args:
            value: See :func:`~lightning_sg.objects.pack`.
            source: The index of a replica.
        """
        return value if self.count == 1 else self.gather(value if self.index == source else None)[source]

    def join(self, batches: list[dict[str, Any]], samples: Callable[[dict[str, Any]], int]) -> list[dict[str, Any]]:
        """Joins the samples of all replicas, for a checkpoint. A collective.

        Args:
            batches: For each batch, tensors on the host in any nesting, most of them ``(N, ...)``.
            samples: The number of samples N of a batch.

        Returns:
            The joined batches. Where tensors differ between replicas in more than the number of samples, the batch is
            that of replica 0 alone.
        """
        if self.count == 1:
            return batches
        return [_joined(list(parts), samples) for parts in zip(*self.gather(batches))]

    def share(self, batches: list[dict[str, Any]], samples: Callable[[dict[str, Any]], int]) -> list[dict[str, Any]]:
        """This replica's slice of what :meth:`join` put together, for any number of replicas at saving."""

        def part(batch: dict[str, Any]) -> Any:
            count = samples(batch)
            if count < self.count:
                return batch  # too few samples to divide: every replica has all of them
            return tree_map_only(
                Tensor,
                lambda tensor: tensor.tensor_split(self.count)[self.index] if _has(tensor, count) else tensor,
                batch,
            )

        return batches if self.count == 1 else [part(batch) for batch in batches]


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an error is one of torch's about other processes, for which it has no class of its own."""
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "processgroup"))


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
    """Whether a leaf is a tensor whose first dimension is the samples."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == count


__all__ = ["Replicas", "is_of_a_collective"]
