"""A traced step leaves the module as it was."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_sg import PartitionError
from lightning_sg.partition.fakes import is_fake
from tests.models import assert_same_state, state_of
from tests.partition.models import CLASSES, WIDTH, Counting, Cut, trace


def test_tracing_changes_nothing_in_the_module() -> None:
    module = Counting()
    module.accuracy.update(torch.eye(CLASSES), torch.zeros(CLASSES, dtype=torch.int64))
    hooked: list[int] = []
    module.parts[1].register_forward_hook(lambda *_: hooked.append(1))
    value = module.accuracy.compute()
    state, parameters = state_of(module), [id(parameter) for parameter in module.parameters()]
    metric_state = {name: tensor.clone() for name, tensor in module.accuracy.metric_state.items()}
    outside = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    keys = set(module.__dict__)
    trace(module)
    assert_same_state(state_of(module), state, exact=True)
    assert [id(parameter) for parameter in module.parameters()] == parameters
    assert not any(is_fake(tensor) for tensor in itertools.chain(module.parameters(), module.buffers()))
    assert torch.equal(torch.get_rng_state(), outside[0])
    assert (str(np.random.get_state()), random.getstate()) == outside[1:]
    assert (module.steps, module.outputs, module.by_name, dict(module.counts)) == (0, [], {}, {})
    assert (list(module.recent), module.names) == ([1], {"before"})
    assert not hasattr(module, "last")
    assert not hasattr(module.parts[0], "steps")
    assert set(module.__dict__) == keys
    assert metric_state.keys() == module.accuracy.metric_state.keys()
    assert all(torch.equal(module.accuracy.metric_state[name], before) for name, before in metric_state.items())
    assert torch.equal(module.accuracy.compute(), value)
    hooked.clear()
    module.parts[1](torch.ones(1, WIDTH))
    assert hooked == [1]  # the user's hook is still there, once
    assert all(parameter.grad is None for parameter in module.parameters())


def test_lists_stay_the_same_objects() -> None:
    module = Counting()
    outputs = module.outputs
    trace(module)
    assert module.outputs is outputs


def test_a_step_that_fails_while_traced_leaves_the_module_whole() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such shape")

    module = Cut(nn.Linear(WIDTH, WIDTH), Broken(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    state, keys = state_of(module), set(module.__dict__)
    with pytest.raises(PartitionError, match="ValueError: no such shape"):
        trace(module)
    assert_same_state(state_of(module), state, exact=True)
    assert set(module.__dict__) == keys
    x = torch.ones(2, WIDTH)
    assert module.cuts[0](x) is x
