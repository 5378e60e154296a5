"""How the tensors of a message travel: through the host's memory with its text, or from device to device."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sg.transport.message import OF_BATCHES, Message


class Carrier(Protocol):
    """The way of the tensors of one link.

    Attributes:
        device: Where tensors must be to be sent, and where they arrive.
        in_frame: Whether their bytes follow the text of their message.
    """

    device: torch.device
    in_frame: bool

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Begins to send tensors that do not follow the text; they must not change until they have been."""

    def receive(self, tensors: Sequence[Tensor]) -> None:
        """Receives into tensors that do not follow the text; what is queued on the device's stream comes after."""

    def stream(self) -> torch.cuda.Stream | None:
        """A stream of the device for a thread of its own; ``None`` for the host."""


class HostCarrier:
    """Tensors follow the text of their message, over the same connection.

    Args:
        target: The device on which they are used: a thread that copies them there needs a stream of its own.
    """

    in_frame = True

    def __init__(self, target: torch.device) -> None:
        self.device = torch.device("cpu")
        self._target = target

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Does nothing: the connection sends them."""

    def receive(self, tensors: Sequence[Tensor]) -> None:
        """Does nothing: the connection fills them."""

    def stream(self) -> torch.cuda.Stream | None:
        """See :meth:`Carrier.stream`."""
        return torch.cuda.Stream(self._target) if self._target.type == "cuda" else None


class DeviceCarrier:
    """Tensors travel from CUDA device to CUDA device over NCCL.

    Args:
        device: This process's device.
        neighbour: The neighbour's global rank.
        out: The NCCL group for what is sent.
        back: That for what is received.
    """

    in_frame = False

    def __init__(self, device: torch.device, neighbour: int, out: Any, back: Any) -> None:
        self.device = device
        self._neighbour = neighbour
        self._out = out
        self._back = back
        self._under_way: SimpleQueue[tuple[list[dist.Work], Sequence[Tensor]]] = SimpleQueue()
        threading.Thread(target=self._release, name="lightning_sg tensors under way", daemon=True).start()

    def send(self, tensors: Sequence[Tensor]) -> None:
        """See :meth:`Carrier.send`."""
        # NCCL does not know every dtype, such as int16 and complex ones: it gets bytes.
        works = [dist.isend(bytes_of(tensor), self._neighbour, group=self._out) for tensor in tensors if tensor.numel()]
        self._under_way.put(([work for work in works if work is not None], tensors))

    def receive(self, tensors: Sequence[Tensor]) -> None:
        """See :meth:`Carrier.receive`."""
        for tensor in tensors:
            if tensor.numel():
                work = dist.irecv(bytes_of(tensor), self._neighbour, group=self._back)
                assert work is not None
                work.wait()

    def stream(self) -> torch.cuda.Stream | None:
        """See :meth:`Carrier.stream`."""
        return torch.cuda.Stream(self.device)

    def _release(self) -> None:
        """Keeps tensors until they have been sent."""
        stream = self.stream()
        with on_stream(stream):
            while True:
                works, tensors = self._under_way.get()
                for work in works:
                    work.wait()
                assert stream is not None
                stream.synchronize()
                del works, tensors


class Carriers:
    """The ways of one link's tensors.

    What stages do together goes through the host, as it is used there.

    Attributes:
        host: The way of all other tensors.
        of_batches: The way of activations, targets and residuals.

    Args:
        device: The device on which tensors of batches are used.
    """

    def __init__(self, device: torch.device) -> None:
        self.host = HostCarrier(device)
        self.of_batches: Carrier = self.host

    def way_of(self, message: Message) -> Carrier:
        """The way of a message's tensors."""
        return self.of_batches if isinstance(message, OF_BATCHES) else self.host


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Has the calling thread work on ``stream``."""
    if stream is None:
        yield
        return
    torch.cuda.set_device(stream.device)
    with torch.cuda.stream(stream):
        yield


def bytes_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor as bytes, without a copy."""
    return tensor.reshape(-1).view(torch.uint8)


__all__ = ["Carrier", "Carriers", "DeviceCarrier", "HostCarrier", "bytes_of", "on_stream"]
