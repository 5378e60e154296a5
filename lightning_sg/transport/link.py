"""The two directions between neighbouring stages: activations down, targets and credits up."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import product

import torch

from lightning_sg.errors import StageLostError
from lightning_sg.transport.message import Message
from lightning_sg.transport.wire import Inbox, Outbox, Wire

_PATIENCE = 10.0  # seconds for last words; a neighbour that hangs does not take them


@dataclass
class Link:
    """One end of the connection to a neighbour.

    Attributes:
        outbox: Messages to the neighbour.
        inbox: Messages from the neighbour.
        neighbour: The neighbour's name, for messages.
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
            raise StageLostError(f"{reason} {message.step or message.kind} could not be sent to it.") from error

    def close(self, timeout: float) -> None:
        """Ends the conversation in good order: both sides have heard everything."""
        self.outbox.close()
        if self.inbox.join(timeout):
            for wire in self.wires:
                wire.close()

    def fail(self, step: str, reason: str) -> None:
        """Tells the neighbour why this process stops; a neighbour that is gone too need not know."""
        with suppress(Exception):
            self.outbox.send(Message(kind="failed", step=step, reason=reason))
            self.outbox.flush(_PATIENCE)


class Upstream(Link):
    """The connection to the process with the stage before this one."""


class Downstream(Link):
    """The connection to the process with the stage after this one."""


def open_links(
    position: int,
    chains: list[list[int]],
    chain: int,
    names: list[str],
    device: torch.device,
    backend: str,
    timeout: float,
) -> tuple[Upstream | None, Downstream | None]:
    """Connects this process with its neighbours. All processes, of all replicas, must call it together.

    Args:
        position: This process's place in its chain, 0 for the first stage.
        chains: Of each replica, the global ranks in the order of the chain.
        chain: Which of them is this process's.
        names: The processes' names for messages, in the same order.
        device: This process's device.
        backend: The backend for tensors: ``"gloo"`` or ``"nccl"``.
        timeout: How many seconds an expected message may take.

    Returns:
        The links to the stages before and after; ``None`` at the ends of the chain.
    """
    upstream: Upstream | None = None
    downstream: Downstream | None = None
    # Every process takes part in making every group.
    for number, place in product(range(len(chains)), range(len(names) - 1)):
        above, below = chains[number][place : place + 2]
        down = Wire(above, below, device, backend, timeout)
        up = Wire(below, above, device, backend, timeout)
        if number != chain:
            continue
        if position == place:
            name = names[place + 1]
            downstream = Downstream(Outbox(down, name), Inbox(up, name, timeout), name, (down, up))
        elif position == place + 1:
            name = names[place]
            upstream = Upstream(Outbox(up, name), Inbox(down, name, timeout), name, (down, up))
    return upstream, downstream


__all__ = ["Downstream", "Link", "Upstream", "open_links"]
