"""What of a training is one process's among several."""

from __future__ import annotations

from lightning_sg.partition.placement import Placement
from lightning_sg.transport import ProcessGrid


class StageOwnership:
    """Goes by where the stages are placed; until they are, everything is everybody's.

    Attributes:
        placement: The stages on the processes, once the first step has been traced; a later one may change it, see
            :class:`FirstUses`.

    Args:
        grid: The processes.
    """

    split = True

    def __init__(self, grid: ProcessGrid) -> None:
        self.placement: Placement | None = None
        self.replicas = grid.peers
        self.has_loss = grid.is_last
        self._grid = grid

    def holds(self, parameter: str) -> bool:
        """See :meth:`Ownership.holds`."""
        placement = self.placement
        if placement is None or parameter not in placement.owner:
            return True
        return placement.holds(self._grid.position, parameter)

    def writes(self, name: str) -> bool:
        """Whether this process saves the parameter or buffer of that name; one does, the last if no stage uses it."""
        last = len(self._grid.ranks) - 1
        owner = last if self.placement is None else self.placement.owner.get(name, last)
        return owner == self._grid.position

    def owns(self, boundary: str) -> bool:
        """See :meth:`Ownership.owns`: the process of the stage before the boundary."""
        return self.placement is None or self.placement.predictor_process(boundary) == self._grid.position

    def owns_inputs(self, boundary: str) -> bool:
        """See :meth:`Ownership.owns_inputs`: the process of the stage after the boundary."""
        placement = self.placement
        if placement is None:
            return True
        return placement.process_of(placement.order.index(boundary) + 1) == self._grid.position


__all__ = ["StageOwnership"]
