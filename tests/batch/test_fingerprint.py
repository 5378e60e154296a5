"""Different batches have different fingerprints, equal ones the same."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sg.batch.fingerprint import fingerprint
from tests.batch.objects import KINDS

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8)


def changed(tensor: Tensor, place: tuple[int, ...]) -> Tensor:
    tensor = tensor.clone()
    tensor[place] += 1
    return tensor


def test_equal_batches_have_equal_fingerprints() -> None:
    assert fingerprint({"x": X, "y": [Y]}) == fingerprint({"x": X.clone(), "y": [Y.clone()]})


@pytest.mark.parametrize(
    "other",
    [
        (changed(X, (0, 0)), Y),
        (changed(X, (7, 2)), Y),
        (X, changed(Y, (3,))),
        (X.reshape(4, 6), Y),
        (X.double(), Y),
        (X, Y.int()),
        (X[:7], Y[:7]),
        (X.flip(0), Y),
        (X,),
        (X, Y, X),
        (X.view(torch.int32), Y),
    ],
    ids=["first", "last", "label", "shape", "dtype", "label dtype", "shorter", "order", "fewer", "more", "same bytes"],
)
def test_different_batches_have_different_fingerprints(other: Any) -> None:
    assert fingerprint(other) != fingerprint((X, Y))


@dataclass
class Sample:
    x: Tensor
    name: str


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (["a", 1], ["a", 2]),
        (["a", 1], ["b", 1]),
        ([np.arange(3)], [np.arange(1, 4)]),
        ([np.arange(4)], [np.arange(4).reshape(2, 2)]),
        (Sample(X, "a"), Sample(X, "b")),
        (Sample(X, "a"), Sample(X + 1, "a")),
    ],
    ids=["number", "text", "array", "array's shape", "dataclass", "tensor in a dataclass"],
)
def test_arrays_numbers_texts_and_dataclasses_count(left: Any, right: Any) -> None:
    assert fingerprint(left) != fingerprint(right)
    assert fingerprint(left) == fingerprint(copy.deepcopy(left))


def test_what_has_no_values_of_a_known_kind_is_left_out() -> None:
    assert fingerprint((X, None, object(), Sample)) == fingerprint((X, object()))
    assert fingerprint(None) == fingerprint([]) == 0


def test_a_tensor_counts_by_its_values_not_by_its_layout_in_memory() -> None:
    turned = X.T.contiguous().T
    assert not turned.is_contiguous()
    assert fingerprint(turned) == fingerprint(X)


def test_empty_tensors_differ_by_shape_and_dtype() -> None:
    kinds = [torch.empty(0), torch.empty(0, 3), torch.empty(0, dtype=torch.int64)]
    assert len({fingerprint(kind) for kind in kinds}) == 3
    assert fingerprint(torch.empty(0, 3)) == fingerprint(torch.empty(0, 3))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.complex64])
def test_every_dtype_counts_by_value(dtype: torch.dtype) -> None:
    tensor = (X > 0).to(dtype)
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor) != fingerprint((X <= 0).to(dtype))


def test_a_scalar_and_a_tensor_with_a_graph_have_fingerprints() -> None:
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))
    assert fingerprint(X.clone().requires_grad_()) == fingerprint(X)


def test_large_batches_are_told_apart() -> None:
    first, second = (torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("kind", KINDS)
def test_objects_of_any_class_are_looked_into(kind: Any) -> None:
    assert fingerprint(kind(X, Y)) == fingerprint(kind(X.clone(), Y.clone()))
    assert fingerprint(kind(X + 1, Y)) != fingerprint(kind(X, Y))
    assert fingerprint([kind(X, Y + 1)]) != fingerprint([kind(X, Y)])


class Timed:
    """Knows when it was made."""

    def __init__(self, moment: float, text: str) -> None:
        self._moment, self.text = moment, text
        self.made_by, self.code = Timed, fingerprint


def test_private_numbers_do_not_count_and_public_ones_do() -> None:
    assert fingerprint(Timed(1.0, "a")) == fingerprint(Timed(2.0, "a"))
    assert fingerprint(Timed(1.0, "a")) != fingerprint(Timed(1.0, "b"))


def test_arrays_of_objects_are_looked_into() -> None:
    left, right = (np.array(["a", None, text], dtype=object) for text in ("b", "c"))
    assert fingerprint(left) != fingerprint(right)
