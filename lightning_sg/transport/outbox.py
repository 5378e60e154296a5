"""Sends messages along a wire without waiting for the receiver."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sg.errors import StageLostError
from lightning_sg.transport.message import End, Message
from lightning_sg.transport.wire import HEAD, HEADS_AHEAD, REST, TENSOR, Wire, bytes_of, first_line, on_stream


class Outbox:
    """Sends messages along a wire; no send waits for the receiver.

    The stages' bookkeeping bounds how many are under way. A thread releases what has been sent.

    Args:
        wire: The direction to send in.
        to: The receiving stage's name, for messages.
    """

    def __init__(self, wire: Wire, to: str) -> None:
        self._wire = wire
        self._to = to
        self._under_way: SimpleQueue[_Sending | threading.Event | None] = SimpleQueue()
        self._error: RuntimeError | None = None
        threading.Thread(target=self._release_sent, name=f"lightning_sg outbox to {to}", daemon=True).start()

    def send(self, message: Message) -> None:
        """Sends ``message``; its tensors must not change afterwards.

        Raises:
            StageLostError: If the receiving process is gone.
        """
        head, rest = message.encode()
        parts = [part for spec, tensor in zip(message.specs, message.tensors) for part in spec.parts(tensor)]
        payload = [bytes_of(part.to(self._wire.wire_device)) for part in parts if part.numel()]
        works: list[dist.Work] = []
        try:
            if self._error is not None:
                raise self._error
            works.append(self._wire.send(head, self._wire.heads, HEAD))
            if rest is not None:
                works.append(self._wire.send(rest, self._wire.heads, REST))
            for tensor in payload:
                works.append(self._wire.send(tensor, self._wire.tensors, TENSOR))
        except RuntimeError as error:
            what = message.doing or f"the message '{type(message).__name__.lower()}'"
            raise StageLostError(
                f"{self._to} is gone: {what} could not be sent to it ({first_line(error)}). Its own output says why."
            ) from error
        self._under_way.put(_Sending(works, [head, *payload] + ([] if rest is None else [rest])))

    def flush(self, timeout: float | None = None) -> None:
        """Waits until everything has been sent."""
        done = threading.Event()
        self._under_way.put(done)
        done.wait(timeout)

    def close(self) -> None:
        """Sends the last message and waits until it has been sent."""
        for _ in range(HEADS_AHEAD):  # the receiver has asked for so many
            self.send(End())
        self.flush()
        self._under_way.put(None)

    def _release_sent(self) -> None:
        stream = self._wire.stream()
        with on_stream(stream):
            while (item := self._under_way.get()) is not None:
                if isinstance(item, threading.Event):
                    item.set()
                    continue
                try:
                    item.wait(stream)
                except RuntimeError as error:
                    self._error = self._error or error  # for the next send
                del item


@dataclass
class _Sending:
    """A message under way; its tensors must live as long."""

    works: list[dist.Work]
    tensors: list[Tensor]

    def wait(self, stream: torch.cuda.Stream | None) -> None:
        for work in self.works:
            work.wait()
        if stream is not None:
            stream.synchronize()


__all__ = ["Outbox"]
