"""The throughput benchmark: what it counts, what it refuses to believe, and its slow links."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import wire
from benchmarks.channel import DEVICE, Channel, NoChannelError, address
from benchmarks.contest import Pace as Seen
from benchmarks.contest import SavedTensors, skipped, speed_of, workload_of
from benchmarks.contestants import COPIES, DELAYED, ONE, OURS, SINGLE, contestants
from benchmarks.tasks import TASKS
from benchmarks.throughput import chosen, conditions, together
from benchmarks.throughput_figure import best, draw, kind_of
from benchmarks.throughput_tables import ratio, speeds_of, tables
from benchmarks.workers import run_group
from benchmarks.workloads import WORKLOADS, emulated, loss_of
from lightning_sg.transport import CODINGS, Message, open_links
from tests.ranks import run_ranks

# ---------------------------------------------------------------------- workloads


@pytest.mark.parametrize("name", [*WORKLOADS, "emulated-3x6"])
def test_stages_one_after_the_other_are_the_model(name: str) -> None:
    workload = workload_of(name)
    inputs, labels = next(iter(workload.batches(1)))
    whole, cut = nn.Sequential(*workload.chunks()), nn.Sequential(*workload.cut())
    loss_of(whole(inputs[:4]), labels[:4]).backward()
    loss_of(cut(inputs[:4]), labels[:4]).backward()
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_an_emulated_stage_sleeps_a_third_in_each_pass_and_a_microbatch_its_share() -> None:
    workload = emulated(2, 0.06)
    stage = workload.cut()[0]
    inputs = torch.randn(64, 64)

    def seconds(rows: int) -> tuple[float, float]:
        """Forwards and backwards, at best: a busy machine sleeps longer, never shorter."""
        tries = []
        for _ in range(5):
            begun = time.perf_counter()
            outputs = stage(inputs[:rows])
            between = time.perf_counter()
            outputs.sum().backward()
            tries.append((between - begun, time.perf_counter() - between))
        return min(forwards for forwards, _ in tries), min(backwards for _, backwards in tries)

    forwards, backwards = seconds(64)
    assert 0.02 <= forwards < 0.035
    assert 0.04 <= backwards < 0.06
    forwards, backwards = seconds(16)
    assert 0.005 <= forwards < 0.015
    assert 0.01 <= backwards < 0.025


# ---------------------------------------------------------------------- turns


def test_the_slowest_rank_counts_but_of_copies_the_sum() -> None:
    workload = emulated(2, 0.1)
    paces = [Seen(10, 1.0, 0.5), Seen(10, 2.0, 0.5)]
    assert speed_of(OURS, workload, paces) == 320
    assert speed_of(COPIES, workload, paces) == 960
    assert speed_of(ONE, workload, [paces[0], None]) == 640


def test_a_chain_that_works_ahead_is_measured_once_it_is_full() -> None:
    workload = emulated(8, 0.1)
    assert skipped(OURS, workload) == skipped(DELAYED, workload) == 16
    assert skipped(ONE, workload) == 2


def test_every_contestant_trains_and_none_is_faster_than_its_devices() -> None:
    workload = emulated(2, 0.02)
    names = list(contestants(workload, [2, 4]))
    arguments = ["--workload", "emulated-2x20", "--microbatches", "2", "4", "--rounds", "1", "--seconds", "0.2"]
    turns = run_group("benchmarks.contest", [*arguments, "--contestants", *names], 2, None)
    speeds = speeds_of({"turns": turns})
    assert list(speeds) == names
    alone = workload.batch / 0.04  # samples/s of one device that sleeps for both stages
    for name, (speed,) in speeds.items():
        single = name in (*SINGLE, "naive")
        assert 0.2 * alone < speed < (1 if single else 2) * 1.01 * alone, name


def test_the_memory_of_a_contestant_is_that_of_its_graph() -> None:
    arguments = ["--workload", "emulated-2x2", "--microbatches", "4", "--rounds", "1", "--seconds", "0.1", "--inspect"]

    def activations(name: str) -> list[int]:
        (found,) = run_group("benchmarks.contest", [*arguments, "--contestants", name], 2, None)
        return [rank["activations"] for rank in found["ranks"]]

    assert activations("GPipe, M=4")[0] > 1.3 * activations("1F1B, M=4")[0] > 0


def test_saved_tensors_are_counted_once_and_given_back() -> None:
    layer = nn.Linear(8, 8)
    inputs = torch.randn(4, 8)
    with SavedTensors() as saved:
        outputs = layer(inputs)
        both = outputs.exp() + (2 * inputs).exp()
        both.sum().backward()
    # The input (of the layer) and the result of exp, which it saves; the weight is no activation.
    assert saved.peak == 2 * 4 * 8 * 4
    del both, outputs
    assert not saved._users


# ---------------------------------------------------------------------- tables and figures


def record(row: str, speeds: dict[str, list[float]], **others: Any) -> dict[str, Any]:
    turns = [
        {"contestant": name, "round": place, "speed": value, "paces": [{"steps": 1, "seconds": 2.0, "worked": 1.0}]}
        for name, values in speeds.items()
        for place, value in enumerate(values)
    ]
    return {"row": row, "workload": "w", "title": "a model", "stages": 2, "turns": turns, "inspected": [], **others}


SPEEDS = {
    ONE: [1.0, 2.0, 4.0],
    COPIES: [2.0, 4.0, 8.0],
    "1F1B, M=4": [1.0, 3.0, 4.0],
    "1F1B, M=8": [1.0, 2.0, 4.0],
    OURS: [1.8, 3.6, 8.0],
}


def test_ratios_are_of_turns_in_the_same_round() -> None:
    assert ratio(SPEEDS, OURS, ONE) == pytest.approx(1.8)
    assert ratio(SPEEDS, OURS, "DDP") is None
    text = tables([record("a", SPEEDS)])
    assert "| lightning_sg | 4 (2-8) | 1.80 | 0.90 | 50% |" in text
    assert "2 processes, 3 rounds" in text


def test_over_links_each_is_compared_with_itself_too() -> None:
    fast = record("f-rate", SPEEDS, megabits=None, latency_ms=0)
    slow = record("f-rate", {**SPEEDS, OURS: [0.9, 1.8, 4.0]}, megabits=50, latency_ms=0)
    text = tables([fast, slow])
    assert "| contestant | unlimited | 50 Mbit/s |" in text
    assert "| lightning_sg | 1.80 (1.00) | 0.90 (0.50) |" in text


def test_the_figure_shows_the_best_of_each_kind(tmp_path: Path) -> None:
    assert best(record("a", SPEEDS), ONE) == {"1F1B": 1.0, OURS: pytest.approx(1.8)}
    assert kind_of("ZBV zero bubble, M=4") == kind_of("interleaved zero bubble, M=2") == "zero bubble"
    assert kind_of("interleaved 1F1B, M=2") == "1F1B"
    assert kind_of(f"{OURS}, delay=2") is kind_of(COPIES) is None
    records = [record("a", SPEEDS), record("e", SPEEDS), record("f-latency", SPEEDS, megabits=None, latency_ms=50)]
    draw(records, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_rows_have_their_contestants() -> None:
    names = list(contestants(WORKLOADS["linears"], [1, 4]))
    assert "1F1B, M=1" not in names  # it needs as many microbatches as stages
    assert "GPipe, M=1" in names
    assert f"{OURS}, wire=int8" in chosen("f-rate", names, None)
    assert f"{OURS}, delay=4" in chosen("f-latency", names, None)
    assert not any("wire" in name or "delay=" in name for name in chosen("a", names, None))
    assert chosen("a", names, [OURS]) == [OURS]
    assert [condition["workload"] for condition in conditions("e", 150.0)] == [
        "emulated-2x150",
        "emulated-4x150",
        "emulated-8x150",
    ]


def test_what_the_wire_costs_is_compared_seed_by_seed() -> None:
    def run(wire: str, seed: int, value: float, task: str = "char-800") -> dict[str, Any]:
        metric = {TASKS[task].metric.key: value}
        return {"task": task, "wire": wire, "seed": seed, "metrics": metric}

    records = [run("full", 0, 2.0), run("full", 1, 3.0), run("int8", 1, 3.1), run("int8", 0, 2.3), run("int8", 2, 9.0)]
    records += [run("full", 0, 0.2, "regression"), run("bf16", 0, 0.21, "regression")]
    text = wire.table(records)
    assert "| int8 | 4.8000 ± 3.6592 | +0.2000 ± 0.1414 | 3 |" in text
    assert "| bf16 | 0.2100 | +5.00 % | 1 |" in text
    planned = wire.plan(["char-800"], [0, 1])
    assert [run.wire for run in planned] == [*CODINGS, *CODINGS]
    assert {(run.split, run.devices) for run in planned} == {("2 stages", 2)}


# ---------------------------------------------------------------------- slow links

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
        upstream, downstream = open_links(rank, [[0, 1]], 0, ["a", "b"], torch.device("cpu"), "gloo", 30.0)
        if downstream is not None:
            for number in range(count):
                downstream.send(Message(number=number, tensors=[torch.ones(100)]))
            downstream.close(30)
            return 0.0
        assert upstream is not None
        upstream.inbox.receive(0, "the first")
        begun = time.perf_counter()
        upstream.inbox.receive(count - 1, "the last")
        took = time.perf_counter() - begun
        upstream.close(30)
        return took

    with channel:
        _, took = run_ranks(2, work)
    assert took < count * latency  # one after the other, each would take four latencies


def test_rounds_of_several_passes_are_put_together() -> None:
    before = {"row": "a", "turns": [{"round": 0, "speed": 1.0}, {"round": 1, "speed": 2.0}]}
    found = together(before, {"row": "a", "turns": [{"round": 0, "speed": 3.0}]})
    assert found["turns"] == [*before["turns"], {"round": 2, "speed": 3.0}]
