"""A slow network between processes of one machine: limited bandwidth, added latency, no change to what runs on it.

Each rank gets a network namespace of its own with one device in it. What goes in there is carried to the other ranks by
a relay process, which holds every packet for the latency; the kernel's token bucket (`tc tbf`) limits the rate of each
device. Needs root and Linux's TUN devices. Packets are large (65 kB), so that the relay's work stays small beside that
of the ranks.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import struct
import subprocess
import time
from collections import deque
from contextlib import suppress
from types import TracebackType

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_PR_SET_PDEATHSIG = 1
_MTU = 65000
_libc = ctypes.CDLL(None, use_errno=True)

DEVICE = "tun0"


class NoChannelError(RuntimeError):
    """This machine or this user may not make networks."""


def address(rank: int) -> str:
    """A rank's address within the network."""
    return f"10.77.0.{rank + 1}"


class Channel:
    """While entered, a network for ``ranks`` processes.

    Args:
        ranks: How many processes.
        megabits: The rate of each rank's device in Mbit/s; ``None`` for as fast as the machine.
        latency: From one rank to another, in seconds.

    Raises:
        NoChannelError: On entering, if it cannot be made here.
    """

    def __init__(self, ranks: int, megabits: float | None, latency: float) -> None:
        self.ranks = ranks
        self.megabits = megabits
        self.latency = latency
        self._namespaces: list[int] = []
        self._devices: list[int] = []
        self._relay = 0

    def enter_as(self, rank: int) -> None:
        """Moves the calling process into the rank's network; for ``preexec_fn``."""
        _checked(_libc.setns(self._namespaces[rank], _CLONE_NEWNET), "join a network namespace")

    def __enter__(self) -> Channel:
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        try:
            for rank in range(self.ranks):
                _checked(_libc.unshare(_CLONE_NEWNET), "make a network namespace")
                self._namespaces.append(os.open("/proc/self/ns/net", os.O_RDONLY))
                self._devices.append(self._device(rank))
        except BaseException:
            self._close()
            raise
        finally:
            _libc.setns(home, _CLONE_NEWNET)
            os.close(home)
        self._relay = os.fork()
        if not self._relay:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            try:
                _carry(self._devices, self.latency)
            finally:
                os._exit(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.kill(self._relay, signal.SIGKILL)
        os.waitpid(self._relay, 0)
        self._close()

    def _close(self) -> None:
        for descriptor in (*self._namespaces, *self._devices):
            os.close(descriptor)
        self._namespaces, self._devices = [], []

    def _device(self, rank: int) -> int:
        try:
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
        except OSError as error:
            raise NoChannelError(f"No TUN device to be had ({error}).") from error
        commands = [
            "ip link set lo up",
            f"ip addr add {address(rank)}/24 dev {DEVICE}",
            f"ip link set {DEVICE} mtu {_MTU} txqueuelen 10000 up",
        ]
        if self.megabits is not None:
            burst = max(2 * _MTU, int(1e6 * self.megabits / 8 / 100))  # what may pass between two ticks of the kernel
            commands.append(
                f"tc qdisc add dev {DEVICE} root tbf rate {self.megabits}mbit burst {burst} limit {256 * 2**20}"
            )
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise NoChannelError(f"`{command}` failed: {getattr(error, 'stderr', error)}") from error
        return device


def _carry(devices: list[int], latency: float) -> None:
    """Carries packets between the devices, each ``latency`` seconds late, until killed."""
    waiting: deque[tuple[float, int, bytes]] = deque()
    poll = select.poll()
    for device in devices:
        poll.register(device, select.POLLIN)
    while True:
        now = time.perf_counter()
        while waiting and waiting[0][0] <= now:
            _due, to, packet = waiting.popleft()
            with suppress(OSError):  # a device that is down loses what is sent to it
                os.write(devices[to], packet)
        pause = None if not waiting else max(0.0, 1000 * (waiting[0][0] - time.perf_counter()))
        for device, event in poll.poll(pause):
            if event & select.POLLERR:  # down
                time.sleep(0.001)
                continue
            for _ in range(16):
                try:
                    packet = os.read(device, 2 * _MTU)
                except BlockingIOError:
                    break
                to = packet[19] - 1  # the last byte of an IPv4 destination, see `address`
                if packet[0] >> 4 == 4 and 0 <= to < len(devices):
                    waiting.append((time.perf_counter() + latency, to, packet))


def _checked(result: int, what: str) -> None:
    if result:
        raise NoChannelError(f"May not {what} here: {os.strerror(ctypes.get_errno())}.")


__all__ = ["DEVICE", "Channel", "NoChannelError", "address"]
