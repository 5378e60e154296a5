"""One direction between two processes: sends that do not wait, and receives that are always ahead."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sg.errors import StageLostError
from lightning_sg.transport.message import HEAD_BYTES, Message

# The receiving thread waits for the next message however long the neighbour computes; it is the waiting for an
# expected one that has the user's timeout. gloo closes a pair for good when one of its own waits runs out.
IDLE_TIMEOUT = timedelta(days=30)

# gloo asks before it sends: the receiver's word that it is ready travels against every transfer. On a link with latency
# a receiver that asked for one message at a time would get one in four latencies, however little is in it. So it asks
# for so many heads ahead, and for the tensors of each as soon as it has its head.
HEADS_AHEAD = 16

_HEAD, _REST, _TENSOR = 0, 1, 2  # tags: heads are asked for ahead, so they must not be taken for what follows them


class Wire:
    """The process groups of one direction, and where tensors lie on their way.

    Args:
        sender: Global rank of the sending process.
        receiver: Global rank of the receiving process.
        device: The stages' device. Tensors travel over NCCL from CUDA devices when that is the backend, and over
            gloo from host memory otherwise. Heads always travel over gloo: reading one must not stop the device.
        backend: The backend for tensors.
        timeout: How many seconds a transfer between devices may take once it has begun.
    """

    def __init__(self, sender: int, receiver: int, device: torch.device, backend: str, timeout: float) -> None:
        self.sender = sender
        self.receiver = receiver
        self.device = device
        ranks = [sender, receiver]
        self.heads = dist.new_group(ranks, backend="gloo", timeout=IDLE_TIMEOUT)
        on_device = backend == "nccl" and device.type == "cuda"
        self.tensors = (
            dist.new_group(ranks, backend="nccl", timeout=timedelta(seconds=timeout)) if on_device else self.heads
        )
        self.wire_device = device if on_device else torch.device("cpu")

    def close(self) -> None:
        """Gives the process groups back."""
        for group in {id(self.heads): self.heads, id(self.tensors): self.tensors}.values():
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)


class Outbox:
    """Sends messages along a wire; none of its sends waits for the receiver.

    The stages' bookkeeping bounds how many are under way. A thread lets go of what has been sent.

    Args:
        wire: The direction to send in.
        to: The receiving stage's name, for messages.
    """

    def __init__(self, wire: Wire, to: str) -> None:
        self._wire = wire
        self._to = to
        self._under_way: SimpleQueue[_Sending | threading.Event | None] = SimpleQueue()
        self._error: RuntimeError | None = None
        threading.Thread(target=self._let_go, name=f"lightning_sg outbox to {to}", daemon=True).start()

    def send(self, message: Message) -> None:
        """Sends ``message``; its tensors must not change afterwards.

        Raises:
            StageLostError: If the receiving process is gone.
        """
        head, rest = message.encode()
        parts = [part for spec, tensor in zip(message.specs, message.tensors) for part in spec.parts(tensor)]
        payload = [_bytes_of(part.to(self._wire.wire_device)) for part in parts if part.numel()]
        works: list[dist.Work] = []
        try:
            if self._error is not None:
                raise self._error
            works.append(self._isend(head, self._wire.heads, _HEAD))
            if rest is not None:
                works.append(self._isend(rest, self._wire.heads, _REST))
            for tensor in payload:
                works.append(self._isend(tensor, self._wire.tensors, _TENSOR))
        except RuntimeError as error:
            raise StageLostError(
                f"{self._to} is gone: {message.step or message.kind} could not be sent to it ({_first_line(error)}). "
                "Its own output says why."
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
            self.send(Message(kind="end"))
        self.flush()
        self._under_way.put(None)

    def _isend(self, tensor: Tensor, group: dist.ProcessGroup, tag: int) -> dist.Work:
        work = dist.isend(tensor, self._wire.receiver, group=group, tag=tag)
        assert work is not None
        return work

    def _let_go(self) -> None:
        stream = torch.cuda.Stream(self._wire.device) if self._wire.device.type == "cuda" else None
        with _on(stream):
            while (item := self._under_way.get()) is not None:
                if isinstance(item, threading.Event):
                    item.set()
                    continue
                try:
                    item.wait(stream)
                except RuntimeError as error:
                    self._error = self._error or error  # for the next send
                del item


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
        self._messages: dict[int, tuple[Message, torch.cuda.Event | None]] = {}
        self._lost: str | None = None
        self._changed = threading.Condition()
        self._arriving: SimpleQueue[_Arriving | Exception] = SimpleQueue()
        self._asked: deque[tuple[dist.Work, Tensor]] = deque()
        # NCCL's receives wait in one stream, in their order, and so do the copies to the device.
        self._stream = torch.cuda.Stream(wire.device) if wire.device.type == "cuda" else None
        threading.Thread(target=self._listen, name=f"lightning_sg heads from {sender}", daemon=True).start()
        self._thread = threading.Thread(target=self._take, name=f"lightning_sg inbox from {sender}", daemon=True)
        self._thread.start()

    def receive(self, number: int, waiting_for: str) -> Message:
        """Returns message ``number``, waiting for it if need be.

        Args:
            number: The number of the batch.
            waiting_for: What the caller needs, for messages: "the target of training batch 17".

        Raises:
            StageLostError: If the sender is gone, failed, or did not send it within the timeout.
        """
        deadline = time.monotonic() + self._timeout
        with self._changed:
            while number not in self._messages:
                if self._lost is not None:
                    raise StageLostError(f"{self._lost} This stage was waiting for {waiting_for}.")
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise StageLostError(
                        f"{self._sender} did not send {waiting_for} within {self._timeout:g} s. It hangs, it was given "
                        "fewer batches, or its batches take longer: raise SyntheticGradientStrategy(timeout=...) then."
                    )
                self._changed.wait(remaining)
            message, event = self._messages.pop(number)
        if event is not None:
            torch.cuda.current_stream(self._wire.device).wait_event(event)
            for tensor in message.tensors:
                tensor.record_stream(torch.cuda.current_stream(self._wire.device))
        return message

    def last_words(self, patience: float = 5.0) -> str | None:
        """Why the sender is lost, in its own words if it had any; waits a moment for them."""
        self._thread.join(patience)
        return self._lost

    def join(self, timeout: float) -> bool:
        """Waits for the sender's last message; returns whether it came."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------ in the threads

    def _listen(self) -> None:
        """Reads heads, and asks for what follows each; waits for none of that."""
        try:
            with _on(self._stream):
                for _ in range(HEADS_AHEAD):
                    self._ask_for_head()
                while self._take_head():
                    self._ask_for_head()
        except Exception as error:  # whatever it is, a waiting stage must hear of it
            self._arriving.put(error)

    def _ask_for_head(self) -> None:
        head = torch.empty(HEAD_BYTES, dtype=torch.uint8)
        self._asked.append((self._ask(head, self._wire.heads, _HEAD), head))

    def _take_head(self) -> bool:
        """Takes the next head; returns whether more are to come."""
        work, head = self._asked[0]  # stays there meanwhile: a transfer in which nobody holds the tensor is an end
        work.wait()
        self._asked.popleft()
        size = Message.rest_bytes(head)
        rest = torch.empty(size, dtype=torch.uint8) if size else None
        if rest is not None:
            self._ask(rest, self._wire.heads, _REST).wait()
        message = Message.decode(head, rest)
        if message.kind == "end":
            for work, _head in self._asked:
                work.wait()
        arriving = _Arriving(message, [spec.empty(self._wire.wire_device) for spec in message.specs])
        for parts in arriving.parts:
            arriving.works += [
                self._ask(_bytes_of(part), self._wire.tensors, _TENSOR) for part in parts if part.numel()
            ]
        self._arriving.put(arriving)
        return message.kind == "batch"

    def _take(self) -> None:
        """Takes messages in their order once their tensors are there."""
        try:
            with _on(self._stream):
                while True:
                    arriving = self._arriving.get()
                    if isinstance(arriving, Exception):
                        raise arriving
                    message = arriving.message
                    if message.kind == "end":
                        return
                    if message.kind == "failed":
                        self._lose(f"{self._sender} failed at {message.step}: {message.reason}.")
                        return
                    self._deliver(arriving)
        except Exception as error:
            self._lose(
                f"{self._sender} is gone: its connection closed ({_first_line(error)}). Its own output says why."
            )

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
            self._messages[message.number] = (message, event)
            self._changed.notify_all()

    def _ask(self, tensor: Tensor, group: dist.ProcessGroup, tag: int) -> dist.Work:
        work = dist.irecv(tensor, self._wire.sender, group=group, tag=tag)
        assert work is not None
        return work

    def _lose(self, reason: str) -> None:
        with self._changed:
            self._lost = reason
            self._changed.notify_all()


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


@dataclass
class _Arriving:
    """A message whose tensors are under way."""

    message: Message
    parts: list[list[Tensor]]
    works: list[dist.Work] = field(default_factory=list)


@contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """The calling thread works on ``stream`` meanwhile."""
    if stream is None:
        yield
        return
    torch.cuda.set_device(stream.device)
    with torch.cuda.stream(stream):
        yield


def _bytes_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor as bytes, without a copy: NCCL does not know every type, such as int16 and complex ones."""
    return tensor.reshape(-1).view(torch.uint8)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


__all__ = ["HEADS_AHEAD", "Inbox", "Outbox", "Wire"]
