"""Receives messages along a wire before they are asked for."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sg.errors import StageLostError
from lightning_sg.transport.message import HEAD_BYTES, Activations, End, Failed, Message, Residual, Target
from lightning_sg.transport.wire import HEAD, HEADS_AHEAD, REST, TENSOR, Wire, bytes_of, first_line, on_stream

Numbered = TypeVar("Numbered", Activations, Target, Residual)


class Inbox:
    """Receives messages along a wire in threads of its own, so that the next are here before they are asked for.

    Args:
        wire: The direction to receive from.
        sender: The sending stage's name, for messages.
        timeout: How many seconds an expected message may take.
    """

    def __init__(self, wire: Wire, sender: str, timeout: float) -> None:
        self._wire = wire
        self._sender = sender
        self._timeout = timeout
        self._messages: dict[tuple[type[Message], int], tuple[Message, torch.cuda.Event | None]] = {}
        self._lost: str | None = None
        self._changed = threading.Condition()
        self._arriving: SimpleQueue[_Arriving | Exception] = SimpleQueue()
        self._asked: deque[tuple[dist.Work, Tensor]] = deque()
        # NCCL's receives wait in one stream, in their order, and so do the copies to the device.
        self._stream = wire.stream()
        threading.Thread(target=self._listen, name=f"lightning_sg heads from {sender}", daemon=True).start()
        self._thread = threading.Thread(target=self._take, name=f"lightning_sg inbox from {sender}", daemon=True)
        self._thread.start()

    def receive(self, kind: type[Numbered], number: int, waiting_for: str) -> Numbered:
        """Returns the message of this kind about batch ``number``, waiting for it if need be.

        Args:
            kind: The type of message.
            number: The number of the batch.
            waiting_for: What the caller needs, for messages: "the target of training batch 17".

        Raises:
            StageLostError: If the sender is gone, failed, or did not send it within the timeout.
        """
        deadline = time.monotonic() + self._timeout
        with self._changed:
            while (kind, number) not in self._messages:
                if self._lost is not None:
                    raise StageLostError(f"{self._lost} This stage was waiting for {waiting_for}.")
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise StageLostError(
                        f"{self._sender} did not send {waiting_for} within {self._timeout:g} s. It hangs, it was given "
                        "fewer batches, or its batches take longer: raise SyntheticGradientStrategy(timeout=...) then."
                    )
                self._changed.wait(remaining)
            message, event = self._messages.pop((kind, number))
        assert isinstance(message, kind)
        if event is not None:
            torch.cuda.current_stream(self._wire.device).wait_event(event)
            for tensor in message.tensors:
                tensor.record_stream(torch.cuda.current_stream(self._wire.device))
        return message

    def last_words(self, patience: float = 5.0) -> str | None:
        """Why the sender is lost, in its own words if it sent any; waits a moment for them."""
        self._thread.join(patience)
        return self._lost

    def join(self, timeout: float) -> bool:
        """Waits for the sender's last message; returns whether it came."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------ in the threads

    def _listen(self) -> None:
        """Reads heads, and asks for what follows each without waiting for it."""
        try:
            with on_stream(self._stream):
                for _ in range(HEADS_AHEAD):
                    self._ask_for_head()
                while self._take_head():
                    self._ask_for_head()
        except Exception as error:  # whatever it is, a waiting stage must hear of it
            self._arriving.put(error)

    def _ask_for_head(self) -> None:
        head = torch.empty(HEAD_BYTES, dtype=torch.uint8)
        self._asked.append((self._wire.receive(head, self._wire.heads, HEAD), head))

    def _take_head(self) -> bool:
        """Takes the next head; returns whether more are to come."""
        work, head = self._asked[0]  # it stays there: gloo aborts a transfer whose tensor nobody holds
        work.wait()
        self._asked.popleft()
        size = Message.rest_bytes(head)
        rest = torch.empty(size, dtype=torch.uint8) if size else None
        if rest is not None:
            self._wire.receive(rest, self._wire.heads, REST).wait()
        message = Message.decode(head, rest)
        if isinstance(message, End):
            for work, _head in self._asked:
                work.wait()
        arriving = _Arriving(message, [spec.empty(self._wire.wire_device) for spec in message.specs])
        for parts in arriving.parts:
            arriving.works += [
                self._wire.receive(bytes_of(part), self._wire.tensors, TENSOR) for part in parts if part.numel()
            ]
        self._arriving.put(arriving)
        return not isinstance(message, (End, Failed))

    def _take(self) -> None:
        """Takes messages in their order once their tensors are here."""
        try:
            with on_stream(self._stream):
                while True:
                    arriving = self._arriving.get()
                    if isinstance(arriving, Exception):
                        raise arriving
                    message = arriving.message
                    if isinstance(message, End):
                        return
                    if isinstance(message, Failed):
                        self._lose(f"{self._sender} failed at {message.doing}: {message.reason}.")
                        return
                    self._deliver(arriving)
        except Exception as error:
            self._lose(f"{self._sender} is gone: its connection closed ({first_line(error)}). Its own output says why.")

    def _deliver(self, arriving: _Arriving) -> None:
        message = arriving.message
        for work in arriving.works:
            work.wait()
        message.tensors = [
            spec.arrange([part.to(self._wire.device) for part in parts])
            for spec, parts in zip(message.specs, arriving.parts)
        ]
        event = self._stream.record_event() if self._stream is not None else None
        with self._changed:
            self._messages[type(message), message.number] = (message, event)
            self._changed.notify_all()

    def _lose(self, reason: str) -> None:
        with self._changed:
            self._lost = reason
            self._changed.notify_all()


@dataclass
class _Arriving:
    """A message whose tensors are under way."""

    message: Message
    parts: list[list[Tensor]]
    works: list[dist.Work] = field(default_factory=list)


__all__ = ["Inbox"]
