"""Workloads: cut into stages they are the model, and an emulated one takes its time."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from benchmarks.contest import workload_of
from benchmarks.workloads import WORKLOADS, emulated, loss_of


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
