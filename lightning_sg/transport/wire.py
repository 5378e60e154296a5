"""The process groups of one direction between two processes, and where tensors lie on their way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sg.transport.grid import ProcessGrid

# The receiving thread waits for the next message however long the neighbour computes. Only the wait for an expected
# message has the user's timeout: gloo closes a pair for good when one of its own waits runs out.
IDLE_TIMEOUT = timedelta(days=30)

# gloo asks before it sends: the receiver's word that it is ready travels against every transfer. On a link with latency
# a receiver that asked for one message at a time would wait four latencies for each, however small. So it asks for
# this many heads ahead, and for the tensors of each as soon as it has the head.
HEADS_AHEAD = 16

# Tags. Heads are asked for ahead, so they must not be taken for what follows them.
HEAD, REST, TENSOR = 0, 1, 2


class Wire:
    """One direction between two processes. All processes must make every wire together.

    Tensors travel over NCCL from CUDA devices when that is the backend, and over gloo from host memory otherwise. Heads
    always travel over gloo: reading one must not stop the device.

    Args:
        sender: Global rank of the sending process.
        receiver: Global rank of the receiving process.
        grid: This process's device, the backend for tensors, and how many seconds a transfer between devices may take
            once it has begun.
    """

    def __init__(self, sender: int, receiver: int, grid: ProcessGrid) -> None:
        self.sender = sender
        self.receiver = receiver
        self.device = grid.device
        ranks = [sender, receiver]
        self.heads = dist.new_group(ranks, backend="gloo", timeout=IDLE_TIMEOUT)
        on_device = grid.backend == "nccl" and grid.device.type == "cuda"
        limit = timedelta(seconds=grid.timeout)
        self.tensors = dist.new_group(ranks, backend="nccl", timeout=limit) if on_device else self.heads
        self.wire_device = grid.device if on_device else torch.device("cpu")

    def send(self, tensor: Tensor, group: dist.ProcessGroup, tag: int) -> dist.Work:
        """Begins to send a tensor, which must not change until the work is done."""
        work = dist.isend(tensor, self.receiver, group=group, tag=tag)
        assert work is not None
        return work

    def receive(self, tensor: Tensor, group: dist.ProcessGroup, tag: int) -> dist.Work:
        """Begins to receive into a tensor."""
        work = dist.irecv(tensor, self.sender, group=group, tag=tag)
        assert work is not None
        return work

    def stream(self) -> torch.cuda.Stream | None:
        """A new stream of the device, for a thread of its own; ``None`` for the host."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def close(self) -> None:
        """Destroys the process groups."""
        for group in {id(self.heads): self.heads, id(self.tensors): self.tensors}.values():
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)


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
    """A contiguous tensor as bytes, without a copy: NCCL does not know every dtype, such as int16 and complex ones."""
    return tensor.reshape(-1).view(torch.uint8)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


__all__ = ["HEAD", "HEADS_AHEAD", "IDLE_TIMEOUT", "REST", "TENSOR", "Wire", "bytes_of", "first_line", "on_stream"]
