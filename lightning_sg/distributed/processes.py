"""The links of a strategy's runs: opened once, for one run after another."""

from __future__ import annotations

from lightning_sg.distributed.continuity import Continuity
from lightning_sg.distributed.rendezvous import Rendezvous, leave_at_exit
from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.lightning_api import pl
from lightning_sg.transport import Chain, ProcessGrid, Watch


class Processes:
    """This process among the others.

    Attributes:
        chain: The links to the neighbours, while there are any.
    """

    def __init__(self) -> None:
        self.chain: Chain | None = None
        self._grid: ProcessGrid | None = None
        self._continuity: Continuity | None = None

    def meet(self, rendezvous: Rendezvous, grid: ProcessGrid, watch: Watch) -> tuple[ProcessGrid, Chain]:
        """Brings the processes together, unless they are.

        Args:
            rendezvous: Where they find each other.
            grid: Their places.
            watch: What this process does, and how long it waits.

        Returns:
            The grid, with the peers in other replicas, and the links.

        Raises:
            StageLostError: If a process does not come, or this one cannot take the place of another.
        """
        chain = self.chain
        if chain is None:
            chain, self._grid = rendezvous.open_chain(grid, watch), None
            self.chain = chain
            leave_at_exit(chain)
            self._continuity = Continuity.of(chain, is_first=rendezvous.is_first)
        if watch.takes_snapshots:  # a new process could not join a process group of torch's
            self._grid = grid
        else:
            rendezvous.open_process_group(grid.backend, chain)
        if self._grid is None:
            self._grid = rendezvous.open_groups(grid, chain)
        return self._grid, chain

    def run(self, runtime: StageRuntime, trainer: pl.Trainer) -> None:
        """A run begins."""
        if self._continuity is not None:
            self._continuity.follow(runtime, trainer)

    def part(self) -> None:
        """The next run connects anew."""
        self.chain = self._grid = self._continuity = None


__all__ = ["Processes"]
