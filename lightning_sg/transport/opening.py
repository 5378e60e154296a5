"""Opens the links of this process to its neighbours."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise

import torch.distributed as dist

from lightning_sg._compat import PrefixStore, Store
from lightning_sg.errors import StageLostError
from lightning_sg.transport.carrier import Carrier, DeviceCarrier, HostCarrier
from lightning_sg.transport.chain import Chain
from lightning_sg.transport.endpoint import Connector, Listener, Meeting, key_of_run
from lightning_sg.transport.grid import ProcessGrid
from lightning_sg.transport.inbox import Neighbour
from lightning_sg.transport.line import Contact, Dial
from lightning_sg.transport.link import Downstream, Upstream
from lightning_sg.transport.watch import Watch
from lightning_sg.transport.words import first_line

_SLICE = 0.2  # seconds between two looks, so that signals are answered

#: Differs for each process.
INCARNATION = secrets.token_hex(8)


def open_chain(grid: ProcessGrid, store: Store, watch: Watch, names: Sequence[str] = ()) -> Chain:
    """Connects this process with its neighbours. A collective of all processes, of all replicas.

    Args:
        grid: The processes.
        store: A store of these processes, for these links alone.
        watch: What this process does, and how long it waits.
        names: The names of this replica's processes for messages, in the order of the stages.

    Raises:
        StageLostError: If a neighbour cannot be reached within the timeout.
    """
    names = names or [f"process {place} of {len(grid.ranks)} (rank {rank})" for place, rank in enumerate(grid.ranks)]
    carriers = _carriers(grid)
    place = grid.position
    key = key_of_run(store)
    listener = (
        None
        if grid.is_last
        else Listener(_meeting(store, grid.ranks[place : place + 2], key), lasting=watch.away is not None)
    )
    upstream = None
    if not grid.is_first:
        dial = Connector(_meeting(store, grid.ranks[place - 1 : place + 1], key))
        above = Neighbour(names[place - 1])
        contact = _reach(dial, above.name, watch)
        upstream = Upstream(dial, contact, carriers[grid.ranks[place - 1]], above, grid.device, watch)
    downstream = None
    if listener is not None:
        below = Neighbour(names[place + 1])
        contact = _reach(listener, below.name, watch)
        downstream = Downstream(listener, contact, carriers[grid.ranks[place + 1]], below, grid.device, watch)
    return Chain(place, upstream, downstream, watch)


def _meeting(store: Store, ranks: Sequence[int], key: bytes) -> Meeting:
    return Meeting(PrefixStore("links", store), f"{ranks[0]}-{ranks[1]}", key, INCARNATION)


def _reach(dial: Dial, name: str, watch: Watch) -> Contact:
    began = time.monotonic()
    while True:
        watch.check()
        try:
            return dial(0, _SLICE)
        except OSError as error:
            if time.monotonic() - began >= watch.timeout:
                raise StageLostError(
                    f"{name} could not be reached within {watch.timeout:g} s ({first_line(error)}). Its process has "
                    "ended, or a firewall keeps the two apart: its own output says which."
                ) from error


def _carriers(grid: ProcessGrid) -> dict[int, Carrier]:
    """By the neighbour's rank, the way of the tensors."""
    carriers: dict[int, Carrier] = {}
    on_device = grid.backend == "nccl" and grid.device.type == "cuda"
    limit = timedelta(seconds=grid.timeout)
    # Every process takes part in making every group.
    for ranks in grid.stage_ranks:
        for pair in pairwise(ranks):
            down, up = (dist.new_group(list(pair), backend="nccl", timeout=limit) if on_device else None for _ in "du")
            if grid.rank in pair:
                neighbour, first = (pair[1], True) if grid.rank == pair[0] else (pair[0], False)
                out, back = (down, up) if first else (up, down)
                carriers[neighbour] = (
                    DeviceCarrier(grid.device, neighbour, out, back) if on_device else HostCarrier(grid.device)
                )
    return carriers


__all__ = ["INCARNATION", "open_chain"]
