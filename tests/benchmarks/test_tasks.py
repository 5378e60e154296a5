"""The registry of tasks and methods."""

from __future__ import annotations

import pytest

from benchmarks.tasks import ALL_METHODS, TASKS
from lightning_sg import SyntheticGradients


@pytest.mark.parametrize("name", list(TASKS))
def test_tasks_cut_their_models(name):
    task = TASKS[name]
    assert task.judged
    assert task.halves in task.splits
    sizes = set()
    for split in task.splits.values():
        model = task.model(learning_rate=1e-2, **split.model)
        assert model.learning_rate == 1e-2
        sizes.add(sum(parameter.numel() for parameter in model.parameters()))
    assert len(sizes) == 1


@pytest.mark.parametrize("method", ALL_METHODS.values(), ids=ALL_METHODS.keys())
def test_methods_are_made(method):
    assert method is None or isinstance(method.callback(), SyntheticGradients)
