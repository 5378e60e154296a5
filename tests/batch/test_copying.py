"""A copy of a batch has the same contents and shares none of them."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from lightning_sg.batch.copying import copy_of
from tests.batch.objects import KINDS
from tests.models import dataset

Pair = namedtuple("Pair", "x y")


def x() -> Tensor:
    return torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_objects_are_copied_with_their_tensors(kind: Any) -> None:
    batch = kind(x(), torch.ones(2))
    copied = copy_of(batch)
    assert type(copied) is kind
    assert torch.equal(copied.x, batch.x)
    copied.x.zero_()
    copied.y.zero_()
    assert torch.equal(batch.x, x())
    assert torch.equal(batch.y, torch.ones(2))


class Record(dict[str, Any]):
    """A dict with an attribute."""


@pytest.mark.parametrize(
    "batch",
    [
        [x()],
        (x(),),
        Pair(x(), None),
        {"a": {"b": x()}},
        UserDict(a=x()),
        OrderedDict(a=x()),
        defaultdict(list, a=x()),
        deque([x()], maxlen=3),
        SimpleNamespace(a=[x()]),
        Record(a=x()),
        [SimpleNamespace(a=(x(),))],
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_containers_are_copied(batch: Any) -> None:
    def first(value: Any) -> Tensor:
        while not isinstance(value, Tensor):
            if isinstance(value, SimpleNamespace):
                value = value.a
            elif isinstance(value, (dict, UserDict)):
                value = next(iter(value.values()))
            else:
                value = value[0]
        return value

    copied = copy_of(batch)
    assert type(copied) is type(batch)
    first(copied).zero_()
    assert torch.equal(first(batch), x())


def test_a_container_may_be_changed_in_the_copy() -> None:
    batch = {"x": x(), "names": ["a"], "seen": {1}, "recent": deque([1], maxlen=1)}
    copied = copy_of(batch)
    copied.pop("x")
    copied["names"].append("b")
    copied["seen"].add(2)
    copied["recent"].append(2)
    assert list(batch) == ["x", "names", "seen", "recent"]
    assert (batch["names"], batch["seen"], list(batch["recent"])) == (["a"], {1}, [1])
    assert list(copied["recent"]) == [2]


def test_what_is_in_two_places_stays_so() -> None:
    shared = x()
    copied = copy_of({"a": shared, "b": [shared]})
    assert copied["a"] is copied["b"][0]
    assert copied["a"] is not shared


def test_arrays_and_packed_sequences_are_copied() -> None:
    array, packed = np.ones(3), pack_sequence([torch.ones(2), torch.ones(1)])
    copied_array, copied = copy_of((array, packed))
    copied_array[:] = 0
    copied.data.zero_()
    assert array.tolist() == [1, 1, 1]
    assert packed.data.tolist() == [1, 1, 1]


class Handle:
    """Closes something when it goes."""

    def __init__(self) -> None:
        self.open = [1]

    def __del__(self) -> None:
        self.open.clear()


class Single:
    """May exist once."""

    def __init__(self) -> None:
        self.names = ["a"]

    def __copy__(self) -> Single:
        raise TypeError("there is one of it")


def test_what_holds_no_data_or_cannot_be_copied_stays_the_same() -> None:
    handle, single = Handle(), Single()
    others = [handle, single, DataLoader(dataset()), dataset, torch.nn.Linear(1, 1), Handle, torch.float32, "x", None]
    assert all(left is right for left, right in zip(copy_of(others), others))
