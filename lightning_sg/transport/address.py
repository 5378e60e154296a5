"""Where the other machines of a run reach this one."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import time
from contextlib import suppress

from lightning_sg._compat import Store
from lightning_sg.transport.hanging_up import place_of
from lightning_sg.transport.watch import Watch

_SIOCGIFADDR = 0x8915  # asks Linux for the address of an interface
_SLICE = 0.05


def address_in_run(store: Store, rank: int, processes: int, watch: Watch) -> str:
    """The address at which the other processes reach this one.

    It is the one from which this machine reaches the store. The machine with the store may do so over loopback; if
    there are others, it goes by the way to them.

    Args:
        store: The store of the run.
        rank: The global rank of this process.
        processes: How many there are.
        watch: How long to wait for the others to say where they are.
    """
    own = _towards(*(place_of(store) or ("localhost", 9)))
    store.set(f"address/{rank}", own)
    keys = [f"address/{other}" for other in range(processes)]
    deadline = watch.clock.now() + watch.timeout
    while ipaddress.ip_address(own).is_loopback and not store.check(keys) and watch.clock.now() < deadline:
        watch.check()
        time.sleep(_SLICE)
    if ipaddress.ip_address(own).is_loopback:
        found = [store.get(key).decode() for key in keys if store.check([key])]
        elsewhere = [address for address in found if not ipaddress.ip_address(address).is_loopback]
        return _towards(elsewhere[0], 9) if elsewhere else own
    return own


def interface_of(address: str) -> str | None:
    """The name of the network interface with an IPv4 address; ``None`` if it is not known."""
    for _index, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            request = struct.pack("256s", name.encode()[:15])
            if socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]) == address:
                return name
    return None


def _towards(host: str, port: int) -> str:
    """The address from which this machine reaches another."""
    family, kind, _protocol, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        found: str = probe.getsockname()[0]
    return found


__all__ = ["address_in_run", "interface_of"]
