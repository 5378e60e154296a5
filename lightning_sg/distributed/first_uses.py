"""Gives a parameter that no traced step has used to the stage that is the first to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_sg.distributed.ownership import StageOwnership
from lightning_sg.distributed.status import ProcessStatus
from lightning_sg.errors import PartitionError
from lightning_sg.partition.fakes import FakeTensors
from lightning_sg.partition.replaced import held_tensors
from lightning_sg.transport import ProcessGrid


@dataclass
class _Unused:
    """A parameter or buffer that no stage has used.

    Attributes:
        held: The dict that holds it in its module.
        key: Its key there.
        gradient: The gradient that it had at first.
        begun: The tensor when this process's stages began, and its version.
        average: Whether it is kept as an average, which changes without being used.
    """

    held: dict[str, Any]
    key: str
    gradient: tuple[Tensor | None, int]
    begun: tuple[Tensor, int]
    average: bool

    @property
    def tensor(self) -> Tensor:
        """The tensor that is there now."""
        tensor: Tensor = self.held[self.key]
        return tensor

    @property
    def is_used(self) -> bool:
        """Whether it has been changed since, or has a gradient."""
        tensor, (begun, version) = self.tensor, self.begun
        gradient, (before, version_before) = _gradient(tensor)[0], self.gradient
        if not self.average and (tensor is not begun or tensor._version != version):
            return True
        return gradient is not None and (gradient is not before or gradient._version != version_before)


class FirstUses:
    """Watches the parameters and buffers that no traced step has used.

    A step may take other layers at another batch: one for each domain, or all but a few that it drops. Which stage such
    a layer is in shows when a batch first goes through it. Until then every process keeps it, with the same values.
    The process that trains it says so, and the others have fake tensors in its place from then on.

    Attributes:
        watches: Whether there were such tensors at first.
        owners: For those that have been used since, the process that owns each.

    Args:
        module: The module.
        ownership: Is told who owns what.
        grid: The processes.
        status: Names this process and what it is doing.
        fakes: Stand for what other processes hold.
        averages: Whether replicas average the gradients of such a parameter, too.
    """

    def __init__(
        self,
        module: nn.Module,
        ownership: StageOwnership,
        grid: ProcessGrid,
        status: ProcessStatus,
        fakes: FakeTensors,
        *,
        averages: bool,
    ) -> None:
        placement = ownership.placement
        assert placement is not None
        unused = [each for each in held_tensors(module) if each.name in placement.unused]
        self._unused: dict[str, _Unused] = {}
        # An error names a parameter rather than the buffers beside it.
        for name, held, key, tensor in sorted(unused, key=lambda each: not isinstance(each.tensor, nn.Parameter)):
            average = name in placement.averages
            self._unused[name] = _Unused(held, key, _gradient(tensor), (tensor, tensor._version), average)
        self._parameters = {name for name, _parameter in module.named_parameters()}
        self.watches = bool(self._unused)
        self.owners: dict[str, int] = {}
        self._ownership = ownership
        self._grid = grid
        self._status = status
        self._fakes = fakes
        self._averages = averages

    def begin(self) -> None:
        """This process's stages begin: what is changed from now on is changed in them."""
        for unused in self._unused.values():
            unused.begun = (unused.tensor, unused.tensor._version)

    def look(self) -> None:
        """This process's stages have run, or gone backward: finds what they have used for the first time.

        Raises:
            PartitionError: If the stage of another process has used it before.
        """
        used = [name for name, unused in self._unused.items() if unused.is_used]
        used += [name for each in used for name in self._buffers_beside(each)]
        for name in dict.fromkeys(used):
            self._use(name, self._grid.position)

    def _buffers_beside(self, name: str) -> list[str]:
        """The buffers of the same layer: BatchNorm changes its own without a sign of it."""
        layer = name.rpartition(".")[0]
        return [
            other
            for other, unused in self._unused.items()
            if layer and other.rpartition(".")[0] == layer and not isinstance(unused.tensor, nn.Parameter)
        ]

    def hear(self, owners: Mapping[str, int]) -> None:
        """Another process has said who uses what.

        Args:
            owners: For the name of a parameter or buffer, the process that has used it.

        Raises:
            PartitionError: If this process's stages have used the same.
        """
        # Of a layer that two use, a parameter is what they know it by.
        for name, process in sorted(owners.items(), key=lambda item: item[0] not in self._parameters):
            self._use(name, process)

    def _use(self, name: str, process: int) -> None:
        known = self.owners.setdefault(name, process)
        if known != process:
            raise self._used_by_two(name, {known, process})
        if self._unused.pop(name, None) is None:
            return
        placement = self._ownership.placement
        assert placement is not None
        if process == self._grid.position and not self._averages:
            raise PartitionError(
                f"{self._status.name}: parameter '{name}' is used for the first time in {self._status.doing}, and "
                "replicas average the gradients of what the first batch uses. Let them look for more: "
                "SyntheticGradientStrategy(ddp={'find_unused_parameters': True})."
            )
        self._ownership.placement = placement.used(name, process)
        if process != self._grid.position:
            self._fakes.take({name})

    def _used_by_two(self, name: str, processes: set[int]) -> PartitionError:
        placement = self._ownership.placement
        assert placement is not None
        names = " and ".join(placement.name(each, self._grid.ranks[each]) for each in sorted(processes))
        return PartitionError(
            f"Parameter '{name}' was used by {names} at different batches ({self._status.doing} is going on). It can "
            "train in one process only: use it in one stage, or give each stage its own."
        )


def _gradient(tensor: Tensor) -> tuple[Tensor | None, int]:
    return tensor.grad, -1 if tensor.grad is None else tensor.grad._version


__all__ = ["FirstUses"]
