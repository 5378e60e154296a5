"""The contest: what it counts, and what it refuses to believe."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.contest import Pace as Seen
from benchmarks.contest import SavedTensors, skipped, speed_of
from benchmarks.contestants import COPIES, DELAYED, ONE, OURS, SINGLE, contestants
from benchmarks.throughput_tables import speeds_of
from benchmarks.workers import run_group
from benchmarks.workloads import emulated


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
    names = list(contestants(workload, [2]))
    arguments = ["--workload", "emulated-2x20", "--microbatches", "2", "--rounds", "1", "--seconds", "0.2"]
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
    assert saved.kept == 0
