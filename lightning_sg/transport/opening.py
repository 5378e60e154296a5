"""Opens the links of this process to its neighbours."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise

import torch.distributed as dist

from lightning_sg._compat import PrefixStore, Store
from lightning_sg.errors import StageLostError
from lightning_sg.transport.address import address_in_run
from lightning_sg.transport.carrier import DeviceCarrier
from lightning_sg.transport.chain import Chain
from lightning_sg.transport.endpoint import Connector, Listener, MeetingPoint, key_of_run
from lightning_sg.transport.grid import ProcessGrid
from lightning_sg.transport.inbox import Neighbour
from lightning_sg.transport.line import Contact, Dial
from lightning_sg.transport.link import Downstream, Upstream
from lightning_sg.transport.watch import Watch
from lightning_sg.words import first_line

_SLICE = 0.2  # seconds between two looks, so that signals are answered


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
    place = grid.position
    address = address_in_run(store, grid.rank, sum(map(len, grid.stage_ranks)), watch)
    key, incarnation = key_of_run(store), secrets.token_hex(8)

    def meeting(above: int) -> MeetingPoint:
        pair = grid.ranks[above : above + 2]
        return MeetingPoint(PrefixStore("links", store), f"{pair[0]}-{pair[1]}", key, incarnation, address)

    listener = None if grid.is_last else Listener(meeting(place), lasting=watch.away is not None)
    upstream = None
    if not grid.is_first:
        dial = Connector(meeting(place - 1))
        above = _neighbour(names[place - 1], grid.ranks[place - 1], watch)
        contact = _reach(dial, above.name, watch)
        upstream = Upstream(dial, contact, above, grid.device, watch)
    downstream = None
    if listener is not None:
        below = _neighbour(names[place + 1], grid.ranks[place + 1], watch)
        contact = _reach(listener, below.name, watch)
        downstream = Downstream(listener, contact, below, grid.device, watch)
    return Chain(place, upstream, downstream, watch, address, len(grid.ranks))


def _neighbour(name: str, rank: int, watch: Watch) -> Neighbour:
    """A neighbour in whose place a new process may come, if the user wants that."""
    if not watch.takes_snapshots:
        return Neighbour(name)
    if rank == 0:
        return Neighbour(name, remark=" No new process can take the place of rank 0, which keeps the store of the run.")
    return Neighbour(name, may_return=True)


def _reach(dial: Dial, name: str, watch: Watch) -> Contact:
    began = watch.clock.now()
    while True:
        watch.check()
        try:
            return dial(0, _SLICE)
        except OSError as error:
            if watch.clock.now() - began >= watch.timeout:
                raise StageLostError(
                    f"{name} could not be reached within {watch.timeout:g} s ({first_line(error)}). Its process has "
                    "ended, or a firewall keeps the two apart: its own output says which."
                ) from error


def carry_between_devices(grid: ProcessGrid, chain: Chain) -> None:
    """Has tensors of batches travel over NCCL from CUDA device to CUDA device. A collective of all processes.

    Args:
        grid: The processes; with another backend or device, tensors stay with their messages.
        chain: The links.
    """
    if grid.backend != "nccl" or grid.device.type != "cuda":
        return
    limit = timedelta(seconds=grid.timeout)
    # Every process takes part in making every group.
    for ranks in grid.stage_ranks:
        for above, below in pairwise(ranks):
            down, up = (dist.new_group([above, below], backend="nccl", timeout=limit) for _ in "du")
            if grid.rank == above and chain.downstream is not None:
                chain.downstream.carry(DeviceCarrier(grid.device, below, down, up))
            elif grid.rank == below and chain.upstream is not None:
                chain.upstream.carry(DeviceCarrier(grid.device, above, up, down))


__all__ = ["carry_between_devices", "open_chain"]
