"""The store of a run, and the roll call that makes sure that all of its processes are there."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from lightning_sg._compat import PrefixStore, Store, TCPStore
from lightning_sg.errors import StageLostError
from lightning_sg.transport.hanging_up import hang_up, place_of
from lightning_sg.transport.interruptible import BlockingThread, interruptible, nothing
from lightning_sg.words import first_line

_SLICE = 0.1  # seconds between two looks, so that signals are answered
_PREFIX = "lightning_sg"  # of the keys in a store that others use, too
_RUNNING = "running"  # the key of the attempt that new processes may join
_KEEPER = "rank 0, which keeps the store,"
_LINGER = 0.5  # seconds
_PATIENCE = 2.0  # seconds for a last word
_ANSWER = timedelta(seconds=10)  # for one question to a store that is there


@dataclass(frozen=True)
class StoreAddress:
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
    def of(cls, host: str, port: int, rank: int, processes: int) -> StoreAddress:
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
        rejoins: Whether the others run already, and this process takes the place of one that is gone.
        outlives: Whether the store is there for later attempts, too, as torchrun's is.
    """

    store: Store
    attempt: str
    rank: int
    processes: int
    keeper: Store
    rejoins: bool = False
    outlives: bool = False

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

    def open_to_others(self) -> None:
        """In rank 0: whoever calls the roll from now on takes the place of a process that is gone."""
        with suppress(RuntimeError):
            PrefixStore(_PREFIX, self.keeper).set(_RUNNING, self.attempt)

    def fail(self, reason: str) -> None:
        """Tells the processes that have no link to this one why it stops, if the store answers."""
        teller = BlockingThread(partial(self.post, f"failed/{self.rank}", reason), "last words", self.hang_up)
        teller.start()
        teller.join(_PATIENCE)

    def hang_up(self) -> None:
        """Ends questions to a store that does not answer them; nothing can be asked any more."""
        hang_up(place_of(self.keeper))

    def answers(self) -> bool:
        """Whether the store is there, where rank 0 keeps it."""
        try:
            self.store.check(["anything"])
        except RuntimeError:
            return False
        return True

    def failed(self) -> dict[int, str]:
        """The reasons of processes that have failed, by rank."""
        found = {rank: self.read(f"failed/{rank}") for rank in range(self.processes) if rank != self.rank}
        return {rank: reason for rank, reason in found.items() if reason is not None}


def call_roll(place: StoreAddress, timeout: float, check: Callable[[], None] = nothing) -> RunStore:
    """Waits until all processes of this attempt are there.

    torchrun's agent keeps one store for all attempts, and on several nodes each agent counts its own restarts. So an
    attempt is known by its processes: each draws a name, rank 0 proposes the names that it sees, and once all of them
    have agreed, the attempt is called by them. What dead processes left in the store is agreed to by nobody.

    A process that comes when all have agreed takes the place of the one with its rank, if the attempt is open to that:
    see :meth:`RunStore.open_to_others`.

    Args:
        place: Where the store is.
        timeout: How many seconds to wait.
        check: Called from time to time; ends the wait by raising.

    Raises:
        StageLostError: If a process does not come in time.
    """
    call = _RollCall(place, time.monotonic() + timeout)

    def look() -> None:
        check()
        if time.monotonic() >= call.deadline + _ANSWER.total_seconds() / 10:  # it hangs in a question to the store
            raise _missing(place, timeout, _KEEPER, "the store does not answer")

    try:
        return interruptible(call.hold, look, wake=partial(hang_up, (place.host, place.port)))
    except _MissingError as error:
        raise _missing(place, timeout, call.missing, str(error)) from None


class _StoreGoneError(Exception):
    """The store cannot be reached, or not any more."""


class _MissingError(Exception):
    """Processes have not come in time."""


class _RollCall:
    """One process's part in a roll call; in a thread, as questions to a store whose host is stopped block.

    Attributes:
        deadline: When to give up, on the monotonic clock.
        missing: Who has not come, as far as is known.
    """

    def __init__(self, place: StoreAddress, deadline: float) -> None:
        self.deadline = deadline
        self.missing = _KEEPER
        self._place = place
        self._name = secrets.token_hex(8)

    def hold(self) -> RunStore:
        """Takes part until all have agreed; a store that goes away was a dead attempt's.

        Raises:
            _MissingError: At the deadline.
        """
        reason = ""
        while time.monotonic() < self.deadline:
            try:
                keeper = self._open()
                return self._agree(PrefixStore(_PREFIX, keeper), keeper)
            except _StoreGoneError as error:
                reason = str(error)
                time.sleep(_SLICE)
        raise _MissingError(reason)

    def _open(self) -> Store:
        """The store; one that is not there yet would be waited for for long, so a socket tries first."""
        place = self._place
        keeps = place.rank == 0 and not place.kept_elsewhere
        try:
            if not keeps:
                socket.create_connection((place.host, place.port), 1.0).close()
            return TCPStore(place.host, place.port, None, keeps, _ANSWER, wait_for_workers=False)
        except (OSError, RuntimeError) as error:
            raise _StoreGoneError(first_line(error)) from error

    def _agree(self, store: Store, keeper: Store) -> RunStore:
        place, step = self._place, _propose if self._place.rank == 0 else _answer
        try:
            while time.monotonic() < self.deadline:
                store.set(f"here/{place.rank}", self._name)
                attempt = step(store, place, self._name)
                if attempt is not None:
                    return self._joined(attempt, store, keeper)
                running = self._running(store)
                if running is not None:
                    return self._joined(running, store, keeper, rejoins=True)
                self._learn(store)
                time.sleep(_SLICE / 2)
            if place.rank == 0:
                store.set(f"given up/{self._proposed(store)}", self.missing)
                time.sleep(_LINGER)  # so that the others can read it
        except RuntimeError as error:
            self.missing = _KEEPER
            raise _StoreGoneError(first_line(error)) from error
        raise _MissingError("")

    def _joined(self, attempt: str, store: Store, keeper: Store, *, rejoins: bool = False) -> RunStore:
        place, own = self._place, PrefixStore(f"attempt {attempt}", store)
        return RunStore(own, attempt, place.rank, place.processes, keeper, rejoins, place.kept_elsewhere)

    def _running(self, store: Store) -> str | None:
        """The attempt that runs without this process, but with another of its rank."""
        if self._place.rank == 0 or not store.check([_RUNNING]):
            return None
        attempt = store.get(_RUNNING).decode()
        mine = store.get(f"agreed/{attempt}/{self._place.rank}").decode() == self._name
        return None if mine else attempt  # one of its own has yet to see that all have agreed

    def _learn(self, store: Store) -> None:
        """Who is missing says rank 0, which may give up before this process does."""
        given_up = f"given up/{self._proposed(store)}"
        if self._place.rank and store.check([given_up]):
            self.missing = store.get(given_up).decode()
            raise _MissingError("")
        if store.check(["missing"]):
            self.missing = store.get("missing").decode()

    def _proposed(self, store: Store) -> str:
        return _name_of(store.get("proposal").decode()) if store.check(["proposal"]) else ""


def _propose(store: Store, place: StoreAddress, name: str) -> str | None:
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


def _answer(store: Store, place: StoreAddress, name: str) -> str | None:
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


def _missing(place: StoreAddress, timeout: float, who: str, why: str) -> StageLostError:
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


__all__ = ["RunStore", "StoreAddress", "call_roll"]
