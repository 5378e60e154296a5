"""One TCP connection between two processes: numbered frames of text and bytes, in order."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from lightning_sg.transport.carrier import bytes_of

# The frame's number; the number of the last frame that the sender has of the receiver; how many bytes of text follow.
_HEADER = struct.Struct("<QQI")
_JOINED = 1 << 16  # what is shorter goes out in one call


class Connection:
    """Sends and receives frames; a thread of its own for each direction may use it.

    Args:
        sock: The connected socket, which is this object's from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = sock

    def give_up_after(self, seconds: float) -> None:
        """Has the system break the connection when the other side has confirmed nothing for so long."""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))

    def send(self, number: int, heard: int, text: bytes, tensors: Sequence[Tensor] = ()) -> None:
        """Sends one frame, and waits until the system has taken it.

        Args:
            number: The frame's number.
            heard: The number of the last frame that this side has of the other.
            text: Its text.
            tensors: On the host and contiguous; their bytes follow the text.

        Raises:
            OSError: If the connection breaks.
        """
        head = _HEADER.pack(number, heard, len(text)) + text
        views = [_view(tensor) for tensor in tensors if tensor.numel()]
        if sum(map(len, views)) <= _JOINED:
            self._socket.sendall(head + b"".join(views))
            return
        self._socket.sendall(head)
        for view in views:
            self._socket.sendall(view)

    def receive(self) -> tuple[int, int, bytes]:
        """Waits for the next frame, and returns its two numbers and text; :meth:`fill` must take its tensors.

        Raises:
            OSError: If the connection breaks or is closed.
        """
        number, heard, length = _HEADER.unpack(self.read(_HEADER.size))
        return number, heard, self.read(length)

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Waits for the bytes of these tensors, which are on the host and contiguous."""
        for tensor in tensors:
            if tensor.numel():
                self._read_into(_view(tensor))

    def write(self, data: bytes) -> None:
        """Sends bare bytes."""
        self._socket.sendall(data)

    def read(self, size: int) -> bytes:
        """Waits for so many bytes."""
        data = bytearray(size)
        self._read_into(memoryview(data))
        return bytes(data)

    def _read_into(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionError("closed by the other side")
            view = view[count:]

    def close(self) -> None:
        """Closes it for both sides; threads that wait for it are woken by an error."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _view(tensor: Tensor) -> memoryview:
    array: Any = bytes_of(tensor).numpy()
    return memoryview(array)


__all__ = ["Connection"]
