"""Weights that stages on several processes use: each has a copy, and they stay in step."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_sg.partition.placement import Placement


class TiedWeights:
    """The copies in this process, which get the sum of the gradients of all.

    As one weight in one process would. The optimizers of the processes then take the same steps; but each waits for the
    others in every backward pass, from the last stage that uses the weight to the first.

    Args:
        module: The user's module.
        placement: Which processes use which weights. All processes must make this together.
        chains: Of each replica, the global ranks in the order of the stages.
        chain: Which of them is this process's.
        position: This process's place in it.
        backend: The backend for tensors.
        timeout: How many seconds a copy waits for the others.
    """

    def __init__(
        self,
        module: nn.Module,
        placement: Placement,
        chains: Sequence[Sequence[int]],
        chain: int,
        position: int,
        backend: str,
        timeout: float,
    ) -> None:
        groups: dict[tuple[int, ...], Any] = {}
        for users in dict.fromkeys(placement.tied.values()):  # every process takes part in making every group
            for number, ranks in enumerate(chains):
                members = [ranks[user] for user in users]
                group = dist.new_group(members, backend=backend, timeout=timedelta(seconds=timeout))
                if number == chain and position in users:
                    groups[users] = group
        self._copies: list[tuple[nn.Parameter, Any]] = []
        #: The ids of the copies that are another process's to save, and to count.
        self.borrowed: set[int] = set()
        for name, parameter in module.named_parameters():
            group = groups.get(placement.tied.get(name, ()))
            if group is not None:
                # Without a seed every process has made weights of its own.
                dist.broadcast(parameter.data, src=chains[chain][placement.owner[name]], group=group)
                self._copies.append((parameter, group))
                if placement.owner[name] != position:
                    self.borrowed.add(id(parameter))

    @property
    def _trained(self) -> list[tuple[nn.Parameter, Any]]:
        return [(copy, group) for copy, group in self._copies if copy.requires_grad]  # callbacks freeze and thaw

    def gradients(self) -> list[Tensor | None]:
        """The gradients of the copies before a backward pass, for :meth:`add_up`."""
        return [None if copy.grad is None else copy.grad.to_dense().clone() for copy, _group in self._trained]

    def add_up(self, before: list[Tensor | None]) -> None:
        """After the backward pass: what it added to the gradient of a copy, all copies add up. A collective."""
        for (copy, group), old in zip(self._trained, before):
            new = _dense_gradient(copy)
            added = new if old is None else new - old
            dist.all_reduce(added, group=group)
            copy.grad = added if old is None else old + added


def _dense_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter) if gradient is None else gradient.to_dense().clone()


__all__ = ["TiedWeights"]
