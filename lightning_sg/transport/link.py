"""The connection to a neighbouring stage: activations go down, targets and residuals come up."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from lightning_sg.errors import StageLostError
from lightning_sg.transport.grid import ProcessGrid
from lightning_sg.transport.inbox import Inbox
from lightning_sg.transport.message import Failed, Message
from lightning_sg.transport.outbox import Outbox
from lightning_sg.transport.wire import Wire

_PATIENCE = 10.0  # seconds for last words; a neighbour that hangs does not take them


@dataclass
class Link:
    """One end of the connection to a neighbour.

    Attributes:
        outbox: Messages to the neighbour.
        inbox: Messages from the neighbour.
        neighbour: The neighbour's name, for messages.
        wires: The two directions.
    """

    outbox: Outbox
    inbox: Inbox
    neighbour: str
    wires: tuple[Wire, Wire]

    def send(self, message: Message) -> None:
        """Sends a message.

        Raises:
            StageLostError: If the neighbour is gone; with its own words, if it had time for any.
        """
        try:
            self.outbox.send(message)
        except StageLostError as error:
            reason = self.inbox.last_words()
            if reason is None:
                raise
            what = message.doing or f"The message '{type(message).__name__.lower()}'"
            raise StageLostError(f"{reason} {what} could not be sent to it.") from error

    def close(self, timeout: float) -> None:
        """Ends the conversation in good order: both sides have heard everything."""
        self.outbox.close()
        if self.inbox.join(timeout):
            for wire in self.wires:
                wire.close()

    def fail(self, doing: str, reason: str) -> None:
        """Tells the neighbour why this process stops; a neighbour that is gone too need not know."""
        with suppress(Exception):
            self.outbox.send(Failed(doing=doing, reason=reason))
            self.outbox.flush(_PATIENCE)


class Upstream(Link):
    """The connection to the process with the stage before this one."""


class Downstream(Link):
    """The connection to the process with the stage after this one."""


def open_links(grid: ProcessGrid, names: list[str]) -> tuple[Upstream | None, Downstream | None]:
    """Connects this process with its neighbours. A collective of all processes, of all replicas.

    Args:
        grid: The processes.
        names: The names of this replica's processes for messages, in the order of the stages.

    Returns:
        The links to the stages before and after; ``None`` at the ends.
    """
    upstream: Upstream | None = None
    downstream: Downstream | None = None
    # Every process takes part in making every group.
    for ranks in grid.stage_ranks:
        for place, (above, below) in enumerate(pairwise(ranks)):
            down, up = Wire(above, below, grid), Wire(below, above, grid)
            if grid.rank == above:
                name = names[place + 1]
                downstream = Downstream(Outbox(down, name), Inbox(up, name, grid.timeout), name, (down, up))
            elif grid.rank == below:
                name = names[place]
                upstream = Upstream(Outbox(up, name), Inbox(down, name, grid.timeout), name, (down, up))
    return upstream, downstream


__all__ = ["Downstream", "Link", "Upstream", "open_links"]
