"""Operations that were seen, to be repeated."""

from __future__ import annotations

import copy

import torch

from lightning_sg.batch.program import FromBatch, Operation, Value


def test_a_copy_leads_to_the_same_nodes_however_many_there_are() -> None:
    value = Value(FromBatch())
    for _ in range(5000):
        value = Value(Operation(function=torch.relu, args=(value,)))
    assert copy.deepcopy(value).node is value.node
