"""What is known about a split once its first step has been traced."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from lightning_sg.distributed.data_parallel import DataParallel
from lightning_sg.distributed.first_uses import FirstUses
from lightning_sg.distributed.inlet import Inlet
from lightning_sg.distributed.outlet import Outlet
from lightning_sg.distributed.tied import SharedWeights
from lightning_sg.errors import PartitionError
from lightning_sg.lightning_api import pl
from lightning_sg.partition.fakes import FakeOutputs, FakeTensors
from lightning_sg.partition.placement import Placement


@dataclass(frozen=True)
class StageProgram:
    """How this process runs a step.

    Attributes:
        placement: The stages on the processes.
        inlet: The start of this process's stages.
        outlet: Their end.
        fakes: Stand in for what other processes hold.
        outputs: What whole remote submodules return for fake tensors.
        data_parallel: Averages gradients over the replicas.
        tied: Weights that several processes use.
        shared: Buffers that several processes use.
        first_uses: Parameters that no traced step has used.
    """

    placement: Placement
    inlet: Inlet
    outlet: Outlet
    fakes: FakeTensors
    outputs: FakeOutputs
    data_parallel: DataParallel
    tied: SharedWeights
    shared: SharedBuffers
    first_uses: FirstUses

    @property
    def must_go_backward(self) -> bool:
        """Whether other processes wait for the gradients of every batch."""
        return self.data_parallel.averages or self.tied.synchronized


class SharedBuffers:
    """Buffers that stages on several processes use: each has a copy, which must not change.

    Args:
        module: The user's module.
        names: The names of the buffers.
    """

    def __init__(self, module: pl.LightningModule, names: Collection[str]) -> None:
        self._module = module
        self._versions = {name: buffer._version for name, buffer in module.named_buffers() if name in names}

    def check(self, name: str, doing: str) -> None:
        """Refuses a change: the other processes would not hear of it.

        Args:
            name: This process's name.
            doing: What it was doing.

        Raises:
            PartitionError: If a buffer was changed.
        """
        if not self._versions:
            return
        buffers: dict[str, Tensor] = dict(self._module.named_buffers())
        for buffer, version in self._versions.items():
            if buffers[buffer]._version != version:
                raise PartitionError(
                    f"{name}: buffer '{buffer}' is used by stages on different processes and was changed in {doing}. "
                    "The others would not see it: give each stage a module of its own, or move a boundary."
                )


__all__ = ["SharedBuffers", "StageProgram"]
