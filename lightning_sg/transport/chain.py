"""Meetings of all stages of one replica, over the links between them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from torch import Tensor

from lightning_sg.objects import pack, unpack
from lightning_sg.transport.history import History
from lightning_sg.transport.link import Downstream, Upstream
from lightning_sg.transport.message import Copy, Gathered, Gathering, Saved, number_of_copy
from lightning_sg.transport.roll_call import RunStore
from lightning_sg.transport.watch import Watch

_NO_MORE = 1 << 62  # above the number of any meeting


class Chain:
    """The links of this process, over which all stages of a replica meet.

    Nothing but the links is needed for a meeting: what the stages bring is passed down to the last stage, and back up.

    Attributes:
        upstream: The link to the stage before; ``None`` for the first.
        downstream: The link to the stage after; ``None`` for the last.
        news: Where processes without a link to this one say why they stop.
        history: What was told in meetings, for a new process in this one's place.
        meetings: How many meetings this process has come to.

    Args:
        position: The place of this process among the stages.
        upstream: See above.
        downstream: See above.
        watch: What this process is doing.
        address: Where the other machines reach this one.
        stages: How many stages the replica has processes for.
    """

    def __init__(
        self,
        position: int,
        upstream: Upstream | None,
        downstream: Downstream | None,
        watch: Watch,
        address: str = "127.0.0.1",
        stages: int = 1,
    ) -> None:
        self.position = position
        self.upstream = upstream
        self.downstream = downstream
        self.watch = watch
        self.address = address
        self.stages = stages
        self.news: RunStore | None = None
        self.history = History()
        self.meetings = 0
        self._failed = False

    @property
    def links(self) -> list[Upstream | Downstream]:
        """Both links, or the one that there is."""
        return [link for link in (self.upstream, self.downstream) if link is not None]

    def gather(self, what: str, own: Any) -> list[Any]:
        """Gives every stage what each brings, in the order of the stages.

        Args:
            what: What the stages meet for, in words.
            own: See :func:`pack`.

        Raises:
            StageLostError: If a stage does not come.
            SyntheticGradientsError: If another stage has come to another meeting.
        """
        if self.history.replaying:
            told = self.history.again(what)
            return [own] * self.stages if told is None else [unpack(each) for each in told]
        number, words, brought = self._pass_down(what, own)
        if self.downstream is not None:
            brought = list(self.downstream.inbox.receive(Gathered, number, words).tensors)
            self._check_same()
        if self.upstream is not None:
            self.upstream.send(Gathered(number=number, doing=self.watch.doing, tensors=brought))
        self.flush()  # whoever ends its process now has done its part
        self.history.note(what, brought)
        return self._unpacked(brought, own)

    def collect(self, what: str, own: Any) -> list[Any]:
        """Gives the last stage what each brings; nobody waits for the stages after it.

        Returns:
            In the last stage what :meth:`gather` would; elsewhere what has come by.
        """
        if self.history.replaying:
            return [own]
        _number, _words, brought = self._pass_down(what, own)
        if self.downstream is not None:
            self.downstream.outbox.flush(self.watch.timeout)
            return [own]
        return self._unpacked(brought, own)

    def spread(self, what: str, tensors: Mapping[str, tuple[Tensor, int]], keeps: Container[str] = ()) -> None:
        """Copies each tensor from the stage that has it into those of all other stages. A meeting.

        Args:
            what: What the stages meet for.
            tensors: Each with the position of the stage that has it, by name; the names are the same in every stage.
            keeps: The names of those of which every stage keeps its own.
        """
        copy = self.copies(what, list(tensors))
        for name, (tensor, owner) in tensors.items():
            # The original may change in the next step, before it has been sent.
            found = copy(name, owner, lambda tensor=tensor: tensor.detach().cpu().clone())  # type: ignore[misc]
            if owner != self.position and name not in keeps:
                tensor.data.copy_(found)

    def copies(self, what: str, names: list[str]) -> Callable[[str, int, Callable[[], Tensor]], Tensor]:
        """Begins a meeting in which tensors are copied from the stage that has each to all others.

        Args:
            what: What the stages meet for.
            names: The names of all tensors, the same in every stage.

        Returns:
            Copies one: takes its name, the position of the stage that has it, and what makes it there; the tensor,
            which must not change afterwards, has to be on the CPU. Every stage must call it for every tensor, in the
            same order.
        """
        if self.history.replaying:  # the others have theirs; here, what is made now is replaced later
            return lambda name, owner, make: make()
        number, words = self._arrive(what)
        numbers = {name: number_of_copy(number, place) for place, name in enumerate(names)}

        def copy(name: str, owner: int, make: Callable[[], Tensor]) -> Tensor:
            self.watch.check()
            source = self.downstream if owner > self.position else self.upstream
            if owner == self.position or source is None:
                tensor = make()
            else:
                (tensor,) = source.inbox.receive(Copy, numbers[name], words).tensors
                self._check_same()
            message = Copy(number=numbers[name], doing=self.watch.doing, tensors=[tensor])
            if self.upstream is not None and owner >= self.position:
                self.upstream.send(message)
            if self.downstream is not None and owner <= self.position:
                self.downstream.send(message)
            return tensor

        return copy

    def _pass_down(self, what: str, own: Any) -> tuple[int, str, list[Tensor]]:
        """Comes to a meeting, and passes on what the stages so far bring, with this one's.

        Returns:
            The meeting's number, what is waited for in words, and what has been brought.
        """
        packed = pack(own)  # refuses what cannot be sent, before anybody waits
        number, words = self._arrive(what)
        brought: list[Tensor] = []
        if self.upstream is not None:
            brought += self.upstream.inbox.receive(Gathering, number, words).tensors
            self._check_same()
        brought.append(packed)
        if self.downstream is not None:
            self.downstream.send(Gathering(number=number, doing=self.watch.doing, tensors=brought))
        return number, words, brought

    def _unpacked(self, brought: list[Tensor], own: Any) -> list[Any]:
        return [own if place == self.position else unpack(each) for place, each in enumerate(brought)]

    def _arrive(self, what: str) -> tuple[int, str]:
        self.meetings += 1
        for link in self.links:
            link.arrive(self.meetings, what, self.watch.doing)
        return self.meetings, f"'{what}' after {self.watch.doing}"

    def _check_same(self) -> None:
        for link in self.links:
            link.inbox.check_meeting()

    def begin_at(self, batch: int) -> int:
        """This process takes another's place, and would take part from a batch on; returns from which one it can.

        Before the first that a neighbour still has for it or needs from it, there is nothing to do.
        """
        if self.upstream is not None:
            batch = max(batch, self.upstream.position.has)
        if self.downstream is not None:
            batch = max(batch, self.downstream.position.wants)
        for link in self.links:
            link.begin_at(batch)
        return batch

    def saved(self) -> None:
        """This process has written down all up to here: the neighbours need not keep it for a new process."""
        for link in self.links:
            link.send(Saved(number=self.meetings))

    def saved_for_good(self) -> None:
        """No new process will take this one's place."""
        for link in self.links:
            link.send(Saved(number=_NO_MORE))

    def fail(self, reason: str) -> None:
        """Tells the neighbours why this process stops, once."""
        if self._failed:
            return
        self._failed = True
        for link in self.links:
            link.fail(self.watch.doing, reason)

    def flush(self) -> None:
        """Waits until the system has all that was sent."""
        for link in self.links:
            link.outbox.flush(self.watch.timeout)

    def leave(self) -> None:
        """Ends the conversations when the process ends, without waiting for the neighbours."""
        for link in self.links:
            link.leave()


__all__ = ["Chain"]
