"""Tensors are found in batches of any structure, and found again in the next."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sg import SyntheticGradientsError
from lightning_sg.batch.path import Attribute, Entry, Path, tensors_in

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    x: Tensor
    y: Any


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Any


class Plain:
    def __init__(self, x: Tensor, y: Any) -> None:
        self.name, self.x, self.y = "a batch", x, y

    def to(self, device: Any) -> Plain:
        return self


class Slotted:
    __slots__ = ("__hidden", "x", "y")

    def __init__(self, x: Tensor, y: Any) -> None:
        self.x, self.y, self.__hidden = x, y, 0


class Store:
    """Offers private entries as attributes, as PyG's ``Data`` does."""

    def __init__(self, **entries: Any) -> None:
        self.__dict__["_store"] = entries

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_store"][name]
        except KeyError:
            raise AttributeError(name) from None


Make = Callable[[Tensor, Any], Any]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x, y: (x, y), "batch[1]"),
        (lambda x, y: [x, "text", y], "batch[2]"),
        (lambda x, y: {"x": x, "y": y}, 'batch["y"]'),
        (lambda x, y: {"x": x, 7: y}, "batch[7]"),
        (lambda x, y: (x, (y, None)), "batch[1][0]"),
        (lambda x, y: (x, {"future": [None, y]}), 'batch[1]["future"][1]'),
        (Pair, "batch.y"),
        (Record, "batch.y"),
        (Frozen, "batch.y"),
        (Plain, "batch.y"),
        (Slotted, "batch.y"),
        (lambda x, y: Store(x=x, y=y), "batch.y"),
        (lambda x, y: (Record(x, Slotted(x, {"deep": y})), np.zeros(3)), 'batch[0].y.y["deep"]'),
    ],
    ids=[
        "pair",
        "list",
        "dict",
        "other key",
        "target and weight",
        "nested",
        "named tuple",
        "dataclass",
        "frozen",
        "object",
        "slots",
        "private store",
        "all of them",
    ],
)
def test_a_tensor_is_found_by_identity_and_again_in_the_next_batch(make: Make, words: str) -> None:
    x, y = torch.zeros(3, 2), torch.zeros(3, 2)  # equal, so that only identity tells them apart
    (path,) = [path for path, tensor in tensors_in(make(x, y)) if tensor is y]
    assert str(path) == words
    after = torch.ones(5)
    assert path.of(make(x, after)) is after


def test_each_tensor_is_found_once_by_the_shortest_path() -> None:
    x = torch.zeros(2)
    found = list(tensors_in({"deep": [[x]], "x": x}))
    assert [str(path) for path, _tensor in found] == ['batch["x"]']


def test_a_batch_that_contains_itself_is_looked_through_once() -> None:
    batch: dict[str, Any] = {"x": torch.zeros(2)}
    batch["self"] = batch
    assert len(list(tensors_in(batch))) == 1


@pytest.mark.parametrize("batch", [None, 3, "text", [], {}, np.zeros(2), torch.nn.Linear(1, 1)])
def test_there_is_nothing_in_what_holds_no_tensor(batch: Any) -> None:
    assert list(tensors_in(batch)) == []


@pytest.mark.parametrize("batch", [(torch.zeros(1),), {"x": 1}, None, Pair(1, 2)])
def test_a_batch_of_another_structure_is_an_error_that_says_what_to_do(batch: Any) -> None:
    path = Path((Entry(1), Attribute("y")))
    with pytest.raises(SyntheticGradientsError, match=r"had batch\[1\]\.y.*context=lambda batch"):
        path.of(batch)
