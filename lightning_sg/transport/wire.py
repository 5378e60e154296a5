"""One direction between two processes: sends that do not wait, and receives that are always ahead."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sg.errors import StageLostError
from lightning_sg.transport.message import HEAD_BYTES, Message

# The receiving thread waits for the next message however long the neighbour computes; it is the waiting for an
# expected one that has the user's timeout. gloo closes a pair for good when one of its own waits runs out.
IDLE_TIMEOUT = timedelta(days=30)

# How many messages may be under way unconfirmed by the transport before the oldest is waited for. The stages' own
# bookkeeping bounds them already; this only lets go of memory that has been sent.
_UNFINISHED = 4


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

    Args:
        wire: The direction to send in.
        to: The receiving stage's name, for messages.
    """

    def __init__(self, wire: Wire, to: str) -> None:
        self._wire = wire
        self._to = to
        self._unfinished: deque[tuple[list[dist.Work], list[Tensor]]] = deque()

    def send(self, message: Message) -> None:
        """Sends ``message``; its tensors must not change afterwards.

        Raises:
            StageLostError: If the receiving process is gone.
        """
        head, rest = message.encode()
        parts = [part for spec, tensor in zip(message.specs, message.tensors) for part in spec.parts(tensor)]
        payload = [part.to(self._wire.wire_device) for part in parts if part.numel()]
        works: list[dist.Work] = []
        try:
            for part in (head, rest):
                if part is not None:
                    works.append(self._isend(part, self._wire.heads))
            for tensor in payload:
                works.append(self._isend(tensor, self._wire.tensors))
            self._unfinished.append((works, [head, *payload] + ([] if rest is None else [rest])))
            while len(self._unfinished) > _UNFINISHED:
                self._finish()
        except RuntimeError as error:
            raise StageLostError(
                f"{self._to} is gone: {message.step or message.kind} could not be sent to it ({_first_line(error)}). "
                "Its own output says why."
            ) from error

    def flush(self) -> None:
        """Waits until everything has been sent."""
        while self._unfinished:
            self._finish()

    def _isend(self, tensor: Tensor, group: dist.ProcessGroup) -> dist.Work:
        work = dist.isend(tensor, self._wire.receiver, group=group)
        assert work is not None
        return work

    def _finish(self) -> None:
        works, _kept_alive = self._unfinished.popleft()
        for work in works:
            work.wait()


class Inbox:
    """Receives messages along a wire in a thread of its own, so that the next is here before it is asked for.

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
        self._thread = threading.Thread(target=self._listen, name=f"lightning_sg inbox from {sender}", daemon=True)
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

    # ------------------------------------------------------------------ in the thread

    def _listen(self) -> None:
        try:
            stream = None
            if self._wire.device.type == "cuda":
                torch.cuda.set_device(self._wire.device)
                stream = torch.cuda.Stream(self._wire.device)
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                while self._take(stream):
                    pass
        except Exception as error:  # whatever it is, a waiting stage must hear of it
            self._lose(
                f"{self._sender} is gone: its connection closed ({_first_line(error)}). Its own output says why."
            )

    def _take(self, stream: torch.cuda.Stream | None) -> bool:
        head = self._receive(torch.empty(HEAD_BYTES, dtype=torch.uint8), self._wire.heads)
        size = Message.rest_bytes(head)
        rest = self._receive(torch.empty(size, dtype=torch.uint8), self._wire.heads) if size else None
        message = Message.decode(head, rest)
        if message.kind == "end":
            return False
        if message.kind == "failed":
            self._lose(f"{self._sender} failed at {message.step}: {message.reason}.")
            return False
        tensors = []
        for spec in message.specs:
            parts = spec.empty(self._wire.wire_device)
            for part in parts:
                if part.numel():
                    self._receive(part, self._wire.tensors)
            tensors.append(spec.arrange([part.to(self._wire.device) for part in parts]))
        message.tensors = tensors
        event = stream.record_event() if stream is not None else None
        with self._changed:
            self._messages[message.number] = (message, event)
            self._changed.notify_all()
        return True

    def _receive(self, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        work = dist.irecv(tensor, self._wire.sender, group=group)
        assert work is not None
        work.wait()
        return tensor

    def _lose(self, reason: str) -> None:
        with self._changed:
            self._lost = reason
            self._changed.notify_all()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


__all__ = ["Inbox", "Outbox", "Wire"]
