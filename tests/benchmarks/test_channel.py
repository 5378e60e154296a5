"""Slow links: a channel adds its latency, carries no more than its rate, and stays to itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from benchmarks.channel import DEVICE, Channel, NoChannelError, address
from lightning_sg._compat import default_store
from lightning_sg.transport import Activations, ProcessGrid, Watch, open_chain
from tests.ranks import run_ranks

_ECHO = """
import socket, sys
server = socket.create_server((sys.argv[1], 5005))
print("ready", flush=True)
connection, _ = server.accept()
while data := connection.recv(65536):
    connection.sendall(data)
"""


_ASK = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5005)) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    size, trips = int(sys.argv[2]), []
    for _ in range(5):
        begun, left = time.perf_counter(), size
        connection.sendall(bytes(size))
        while left:
            left -= len(connection.recv(65536))
        trips.append(time.perf_counter() - begun)
    print(min(trips))
"""


def round_trip(channel: Channel, size: int) -> float:
    """Seconds that so many bytes take there and back, at best."""
    with channel:
        echo = subprocess.Popen(
            [sys.executable, "-c", _ECHO, address(1)], stdout=subprocess.PIPE, preexec_fn=lambda: channel.enter_as(1)
        )
        try:
            assert echo.stdout is not None
            echo.stdout.readline()
            ask = subprocess.run(
                [sys.executable, "-c", _ASK, address(1), str(size)],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
                preexec_fn=lambda: channel.enter_as(0),
            )
        finally:
            echo.kill()
            echo.communicate()
    return float(ask.stdout)


@pytest.fixture
def networks() -> None:
    try:
        with Channel(2, 100, 0.0):
            pass
    except NoChannelError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("networks")
def test_a_channel_adds_its_latency_each_way() -> None:
    assert 0.06 <= round_trip(Channel(2, None, 0.03), 1) < 0.3


@pytest.mark.usefixtures("networks")
def test_a_channel_carries_no_more_than_its_rate() -> None:
    # 4 MB there and back at 80 Mbit/s; both directions go on at the same time.
    limited = round_trip(Channel(2, 80, 0.0), 4_000_000)
    assert limited > 0.3
    assert round_trip(Channel(2, None, 0.0), 4_000_000) < limited


@pytest.mark.usefixtures("networks")
def test_this_process_stays_in_its_own_network() -> None:
    with Channel(2, None, 0.0), socket.socket() as probe, pytest.raises(OSError, match=r"Cannot assign|unreachable"):
        probe.bind((address(0), 0))


@pytest.mark.usefixtures("networks")
def test_messages_on_a_slow_link_are_under_way_together() -> None:
    latency, count = 0.05, 12
    channel = Channel(2, None, latency)

    def work() -> float:
        rank = int(os.environ["RANK"])
        channel.enter_as(rank)
        os.environ.update(MASTER_ADDR=address(0), GLOO_SOCKET_IFNAME=DEVICE)
        dist.init_process_group("gloo", timeout=timedelta(seconds=30))
        grid = ProcessGrid(((0, 1),), 0, rank, torch.device("cpu"), "gloo", 30.0)
        chain = open_chain(grid, default_store(), Watch(30.0), ["a", "b"])
        upstream, downstream = chain.upstream, chain.downstream
        if downstream is not None:
            for number in range(count):
                downstream.send(Activations(number=number, tensors=[torch.ones(100)]))
            downstream.close(30)
            return 0.0
        assert upstream is not None
        upstream.inbox.receive(Activations, 0, "the first")
        begun = time.perf_counter()
        upstream.inbox.receive(Activations, count - 1, "the last")
        took = time.perf_counter() - begun
        upstream.close(30)
        return took

    with channel:
        _, took = run_ranks(2, work)
    assert took < count * latency  # one after the other, each would take four latencies
