"""The registry of tasks and methods."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.tasks import ALL_METHODS, TASKS, UNCUT, Split
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
    assert method is None or isinstance(method.callback(Split({})), SyntheticGradients)


def test_a_method_changes_the_optimizer_and_the_size_of_batches():
    task = TASKS["colour-cnn"]
    model, data = task.model(learning_rate=1e-2, stages=1), task.data(None, 0)
    method = ALL_METHODS["backpropagation, NAdam, twice the batch"]
    method.prepare(model, data)
    assert data.batch_size == 256
    model._trainer = SimpleNamespace(estimated_stepping_batches=10)
    made = model.configure_optimizers()["optimizer"]
    assert isinstance(made, torch.optim.NAdam)
    assert made.defaults["betas"] == (0.95, 0.999)
    assert made.defaults["lr"] == 1e-2
    assert made.defaults["weight_decay"] == model.weight_decay


def test_a_method_trains_with_plain_sgd():
    model = TASKS["hard-mlp-8-plain"].model(learning_rate=1e-1, cuts="every")
    ALL_METHODS["local loss, SGD"].prepare(model, SimpleNamespace(batch_size=8))
    model._trainer = SimpleNamespace(estimated_stepping_batches=10)
    made = model.configure_optimizers()["optimizer"]
    assert isinstance(made, torch.optim.SGD)
    assert (made.defaults["lr"], made.defaults["momentum"]) == (1e-1, 0)
    assert not any(isinstance(part, torch.nn.BatchNorm1d) for part in model.modules())


def test_methods_that_see_no_boundary_run_once_for_all_splits():
    assert {"backpropagation", "backpropagation, NAdam", "backpropagation, twice the batch"} <= set(UNCUT)
    assert "half late, NAdam" not in UNCUT
