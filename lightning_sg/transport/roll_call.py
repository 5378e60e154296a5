"""The store of a run, and the roll call that makes sure that all of its processes are there."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from lightning_sg._compat import PrefixStore, Store, TCPStore
from lightning_sg.errors import StageLostError
from lightning_sg.transport.words import first_line

_SLICE = 0.1  # seconds between two looks, so that signals are answered
_ANSWER = timedelta(seconds=10)  # for one question to a store that is there


@dataclass(frozen=True)
class Place:
    """Where the processes of a run find their store.

    Attributes:
        host: The address of the machine with the store.
        port: Its port there.
        rank: The global rank of this process.
        processes: How many there are.
        kept_elsewhere: Whether a launcher keeps the store; otherwise rank 0 does.
    """

    host: str
    port: int
    rank: int
    processes: int
    kept_elsewhere: bool = False

    @classmethod
    def of(cls, host: str, port: int, rank: int, processes: int) -> Place:
        """The place that a launcher's environment variables mean."""
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(host, port, rank, processes, kept)


@dataclass(frozen=True)
class RunStore:
    """The store of this attempt at a run; nothing of an earlier attempt is in it.

    Attributes:
        store: For the processes of this attempt alone.
        attempt: The attempt's name.
        rank: The global rank of this process.
        processes: How many there are.
        keeper: Keeps the store alive, in rank 0.
    """

    store: Store
    attempt: str
    rank: int
    processes: int
    keeper: Store

    def post(self, key: str, text: str) -> None:
        """Leaves word for the other processes, if the store is still there."""
        try:
            self.store.set(key, text)
        except RuntimeError:
            return

    def read(self, key: str) -> str | None:
        """Reads a word that another process has left; ``None`` if there is none."""
        try:
            return self.store.get(key).decode() if self.store.check([key]) else None
        except RuntimeError:
            return None

    def come_to(self, step: int) -> None:
        """Notes how far this process has come at start-up."""
        self.post(f"come/{self.rank}", str(step))

    def fail(self, reason: str) -> None:
        """Tells the processes that have no link to this one yet why it stops."""
        self.post(f"failed/{self.rank}", reason)

    def failed(self) -> dict[int, str]:
        """The reasons of processes that have failed, by rank."""
        found = {rank: self.read(f"failed/{rank}") for rank in range(self.processes) if rank != self.rank}
        return {rank: reason for rank, reason in found.items() if reason is not None}

    def behind(self, step: int) -> list[int]:
        """The ranks that have not come as far."""
        return [rank for rank in range(self.processes) if int(self.read(f"come/{rank}") or -1) < step]


def call_roll(place: Place, timeout: float, check: Callable[[], None] = lambda: None) -> RunStore:
    """Waits until all processes of this attempt are there.

    torchrun's agent keeps one store for all attempts, and on several nodes each agent counts its own restarts. So an
    attempt is known by its processes: each draws a name, rank 0 proposes the names that it sees, and once all of them
    have agreed, the attempt is called by them. What dead processes left in the store is agreed to by nobody.

    Args:
        place: Where the store is.
        timeout: How many seconds to wait.
        check: Called from time to time; ends the wait by raising.

    Raises:
        StageLostError: If a process does not come in time.
    """
    deadline = time.monotonic() + timeout
    name = secrets.token_hex(8)
    missing = "rank 0, which keeps the store"
    while True:
        check()
        try:
            keeper = _open(place, deadline, check)
            missing = "others"
            return _agree(PrefixStore("lightning_sg", keeper), keeper, place, name, deadline, check)
        except _StoreGoneError as error:
            if time.monotonic() >= deadline:
                raise _missing(place, timeout, missing if missing != "others" else "rank 0", str(error)) from error
        except _MissingError as error:
            raise _missing(place, timeout, str(error), "") from None
        time.sleep(_SLICE)


class _StoreGoneError(Exception):
    """The store cannot be reached, or not any more."""


class _MissingError(Exception):
    """Processes have not come."""


def _open(place: Place, deadline: float, check: Callable[[], None]) -> Store:
    """The store; connecting to one that is not there yet would block in C++, so a socket tries first."""
    keeps = place.rank == 0 and not place.kept_elsewhere
    while not keeps:
        check()
        try:
            socket.create_connection((place.host, place.port), 1.0).close()
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise _StoreGoneError(first_line(error)) from error
            time.sleep(_SLICE)
    try:
        return TCPStore(place.host, place.port, None, keeps, _ANSWER, wait_for_workers=False)
    except RuntimeError as error:
        raise _StoreGoneError(first_line(error)) from error


def _agree(
    store: Store, keeper: Store, place: Place, name: str, deadline: float, check: Callable[[], None]
) -> RunStore:
    try:
        while True:
            store.set(f"here/{place.rank}", name)
            attempt = (_propose if place.rank == 0 else _answer)(store, place, name)
            if attempt is not None:
                own = PrefixStore(f"attempt {attempt}", store)
                return RunStore(own, attempt, place.rank, place.processes, keeper)
            check()
            if time.monotonic() >= deadline:
                raise _MissingError(store.get("missing").decode() if store.check(["missing"]) else "rank 0")
            time.sleep(_SLICE / 2)
    except RuntimeError as error:
        raise _StoreGoneError(first_line(error)) from error


def _propose(store: Store, place: Place, name: str) -> str | None:
    """In rank 0: proposes who takes part; returns the attempt's name once all have agreed."""
    there = [rank for rank in range(place.processes) if store.check([f"here/{rank}"])]
    names = {str(rank): store.get(f"here/{rank}").decode() for rank in there}
    proposal = json.dumps(names)
    attempt = _name_of(proposal)
    store.set("proposal", proposal)
    agreed = [rank for rank in there if rank == 0 or store.check([f"agreed/{attempt}/{rank}"])]
    if len(agreed) == place.processes:
        store.set(f"all/{attempt}", name)
        return attempt
    store.set("missing", _listed([rank for rank in range(place.processes) if rank not in agreed]))
    return None


def _answer(store: Store, place: Place, name: str) -> str | None:
    """In the other ranks: agrees to a proposal that has them; returns its name once all have agreed."""
    if not store.check(["proposal"]):
        return None
    proposal = store.get("proposal").decode()
    attempt = _name_of(proposal)
    if json.loads(proposal).get(str(place.rank)) != name:
        return None
    store.set(f"agreed/{attempt}/{place.rank}", name)
    return attempt if store.check([f"all/{attempt}"]) else None


def _name_of(proposal: str) -> str:
    return hashlib.sha256(proposal.encode()).hexdigest()[:16]


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _missing(place: Place, timeout: float, who: str, why: str) -> StageLostError:
    where = f"{place.host}:{place.port}"
    started = (
        "LOCAL_RANK is set in the environment, so Lightning takes this process for one of several that somebody else "
        "starts: unset it, or start all of them. "
        if "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
        else ""
    )
    return StageLostError(
        f"rank {place.rank}: {who} did not come within {timeout:g} s ({place.processes} processes meet at {where}"
        f"{': ' * bool(why)}{why}). {started}Their own output says why, if they were started; else check that devices "
        f"and num_nodes are the same everywhere, and that no firewall keeps them from {where}. If they only take "
        "longer to start, raise SyntheticGradientStrategy(timeout=...).",
        f"{who} did not come within {timeout:g} s.",
    )


__all__ = ["Place", "RunStore", "call_roll"]
