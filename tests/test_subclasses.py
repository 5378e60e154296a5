"""Tensors of a class of the user's own, with methods that need what the class added, train as plain tensors do."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sg.subclasses import of_own_class, plain_tensor
from tests.models import assert_same_state, dataset
from tests.two_stages import Two, fit


class Named(Tensor):
    """A tensor with a name for each column; its own methods fail on results of operations, which have none."""

    columns: list[str]

    def clone(self, **options: Any) -> Named:  # type: ignore[override]
        return named(super().clone(**options), deepcopy(self.columns))

    def reshape(self, *shape: int) -> Named:  # type: ignore[override]
        raise NotImplementedError(f"the columns {self.columns} are lost")


def named(tensor: Tensor, columns: list[str]) -> Named:
    made = tensor.as_subclass(Named)
    made.columns = columns
    return made


class ReadsNames(Two):
    """Reads the names in every step, before any parameter is used."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        assert x.clone().columns == ["a", "b"]
        assert type(Named(torch.ones(1))) is Named
        logits = self(x).as_subclass(Named)
        logits.columns = ["c"]
        return F.cross_entropy(plain_tensor(logits), y)


def plain_loader() -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=16)


class NamedLoader:
    """Batches whose inputs are of the own class."""

    def __iter__(self) -> Any:
        for x, y in plain_loader():
            yield named(x, ["a", "b"]), y

    def __len__(self) -> int:
        return len(plain_loader())


class LabelledLoss(Two):
    """Makes tensors of the own class of the labels and without it, and compares them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        labels = named(y.as_subclass(Tensor)[:], ["label"])
        return F.cross_entropy(self(x), labels.as_subclass(Tensor))


class LabelledLoader(NamedLoader):
    """Batches all of whose tensors are of the own class."""

    def __iter__(self) -> Any:
        for x, y in plain_loader():
            yield named(x, ["a", "b"]), named(y, ["label"])


def test_they_train_as_plain_tensors_do() -> None:
    assert_same_state(fit(Two, data=plain_loader), fit(ReadsNames, data=NamedLoader), exact=True)


def test_two_processes_equal_one() -> None:
    expected = fit(ReadsNames, data=NamedLoader)
    for state in fit(ReadsNames, 2, data=NamedLoader):
        assert not hasattr(state, "trace"), state.trace
        assert_same_state(expected, state)


def test_labels_of_an_own_class_are_found_by_the_loss(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(LabelledLoss, data=LabelledLoader)
    assert "predicts from batch[1], by the model's cross_entropy" in caplog.text


def test_torch_is_left_as_it_was() -> None:
    fit(ReadsNames, data=NamedLoader)
    assert not {"as_subclass", "__new__"} & vars(Tensor).keys()
    assert torch.Tensor([1.0, 2.0]).shape == (2,)


def test_the_step_is_followed_to_the_loss() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*check of the boundaries.*|.*could not be checked.*")
        fit(ReadsNames, data=NamedLoader)


def test_a_plain_view_shares_data_and_gradient() -> None:
    leaf = torch.ones(2, requires_grad=True)
    own = named(leaf * 2, ["a"])
    assert of_own_class(own)
    view = plain_tensor(own)
    assert type(view) is Tensor
    assert view.data_ptr() == own.data_ptr()
    view.sum().backward()
    assert leaf.grad is not None
    assert type(leaf.grad) is Tensor


def test_plain_tensors_and_parameters_are_left_as_they_are() -> None:
    for tensor in (torch.ones(1), torch.nn.Parameter(torch.ones(1))):
        assert not of_own_class(tensor)
        assert plain_tensor(tensor) is tensor
