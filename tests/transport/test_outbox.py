"""Frames that a broken connection may have lost go over the next one, in order, until the receiver has them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sg.transport.carrier import Carriers
from lightning_sg.transport.line import Contact, Position
from lightning_sg.transport.message import Activations, Alive, Gathered, Message
from lightning_sg.transport.outbox import Outbox


class Wire:
    """A connection that keeps what is sent over it.

    Args:
        breaks_at: The frame at which it breaks.
    """

    def __init__(self, breaks_at: int = 0) -> None:
        self.sent: list[int] = []
        self.on_send = lambda: None
        self._breaks_at = breaks_at

    def send(self, number: int, heard: int, text: bytes, tensors: Sequence[Tensor] = ()) -> None:
        if number == self._breaks_at:
            raise ConnectionError("broken")
        if number:
            self.sent.append(number)
            self.on_send()


class FakeLine:
    """Hands out one connection after another."""

    lasting = True

    def __init__(self, first: Wire, *, renewable: bool = False) -> None:
        self.renewable = renewable
        self._wire: Wire | None = first
        self._changed = threading.Condition()

    def current(self) -> Wire:
        with self._changed:
            assert self._changed.wait_for(lambda: self._wire is not None, 10)
            assert self._wire is not None
            return self._wire

    def broke(self, wire: Wire, error: OSError) -> None:
        with self._changed:
            if self._wire is wire:
                self._wire = None
            self._changed.notify_all()

    def wait_until_broken(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._wire is None, 10)

    def take(self, wire: Wire) -> None:
        with self._changed:
            self._wire = wire
            self._changed.notify_all()


def outbox_on(line: Any) -> Outbox:
    return Outbox(line, Carriers(torch.device("cpu")), "stage 1", Alive, 60.0, lambda: 0)


def contact(heard: int) -> Contact:
    none: Any = None
    return Contact(none, heard, "", Position())


def send(outbox: Outbox, *messages: Message) -> None:
    for message in messages:
        outbox.send(message)


def test_what_was_not_heard_goes_over_the_next_connection_before_what_waits() -> None:
    first, second = Wire(breaks_at=4), Wire()
    line = FakeLine(first)
    outbox = outbox_on(line)
    send(outbox, *(Activations(number=number) for number in range(4)))
    line.wait_until_broken()
    assert first.sent == [1, 2, 3]
    outbox.again(contact(heard=1))
    line.take(second)
    assert outbox.flush(10)
    assert second.sent == [2, 3, 4]
    outbox.close()


def test_a_frame_that_was_sent_while_the_connection_was_replaced_is_sent_again() -> None:
    first, second = Wire(), Wire()
    line = FakeLine(first)
    outbox = outbox_on(line)

    def replace() -> None:
        outbox.again(contact(heard=0))
        line.take(second)

    first.on_send = replace
    send(outbox, Activations(number=0))
    assert outbox.flush(10)
    assert (first.sent, second.sent) == ([1], [1])
    outbox.close()


def test_a_new_process_is_sent_what_it_has_not_saved_of_meetings() -> None:
    first, second = Wire(), Wire()
    line = FakeLine(first, renewable=True)
    outbox = outbox_on(line)
    send(outbox, Gathered(number=1), Activations(number=0), Gathered(number=2), Activations(number=1))
    assert outbox.flush(10)
    outbox.saved(1)
    outbox.heard(3)
    assert outbox.first_batch == 1  # the process before has had the one before that
    outbox.renew()
    outbox.again(contact(heard=0))
    line.take(second)
    send(outbox, Activations(number=2))
    assert outbox.flush(10)
    assert second.sent[-3:] == [3, 4, 5]
    outbox.close()
