"""Boundaries in a module, with and without a crossing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sg import Boundary, BoundaryError
from lightning_sg.boundary import Boundaries
from tests.models import Classifier, assert_same_state, dataset

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8)


def test_a_boundary_without_callback_hands_on_what_it_is_given() -> None:
    value = {"a": [X, "text"], "b": None}
    assert Boundary()(X) is X
    assert Boundary()(value) is value
    first, second = Boundary()(X, Y)
    assert first is X
    assert second is Y


def test_boundaries_leave_no_trace_in_parameters_and_state() -> None:
    boundary = Boundary()
    assert list(boundary.parameters()) == []
    assert dict(boundary.state_dict()) == {}
    assert list(nn.Sequential(nn.Linear(2, 2), boundary).state_dict()) == ["0.weight", "0.bias"]


def test_the_gradient_goes_through_a_boundary_without_callback() -> None:
    leaf = X.clone().requires_grad_()
    (Boundary()(leaf) * 3).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(X, 3.0))  # type: ignore[arg-type]


def test_a_copy_of_a_cut_model_is_an_ordinary_model() -> None:
    module = Classifier(stages=3)
    boundaries = Boundaries(module, None)
    seen: list[str] = []

    def crossing(name: str) -> Any:
        def cross(tensors: list[Tensor]) -> list[Tensor]:
            seen.append(name)
            return [tensor + 1 for tensor in tensors]

        return cross

    for site in boundaries.sites:
        site.open(crossing(site.name))
    copied = copy.deepcopy(module)
    assert_same_state(dict(copied.state_dict()), dict(module.state_dict()), exact=True)
    x = dataset().tensors[0]
    plain = copied(x)
    assert seen == []
    cut = module(x)
    assert seen == ["net.1", "net.3"]
    assert not torch.allclose(cut, plain)
    boundaries.remove()
    torch.testing.assert_close(module(x), plain)


def test_boundaries_by_name_are_hooks_that_come_and_go() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    boundaries = Boundaries(module, ["0"])
    boundaries.sites[0].open(lambda tensors: [torch.zeros_like(tensor) for tensor in tensors])
    assert torch.equal(module(X), torch.zeros(8, 3))
    boundaries.close()
    assert not torch.equal(module(X), torch.zeros(8, 3))
    boundaries.remove()
    boundaries.sites[0].open(lambda tensors: [torch.zeros_like(tensor) for tensor in tensors])
    assert not torch.equal(module(X), torch.zeros(8, 3))


def test_tensors_in_any_nesting_cross_and_the_rest_stays() -> None:
    module = nn.Sequential(Boundary())
    boundaries = Boundaries(module, None)
    boundaries.sites[0].open(lambda tensors: [-tensor for tensor in tensors])
    crossed = module[0]({"a": (X, 3), "b": [None, Y]}, "text")
    assert crossed[1] == "text"
    assert torch.equal(crossed[0]["a"][0], -X)
    assert crossed[0]["a"][1] == 3
    assert crossed[0]["b"][0] is None
    assert torch.equal(crossed[0]["b"][1], -Y)


def test_a_boundary_that_is_given_no_tensor_says_so() -> None:
    module = nn.Sequential(Boundary())
    boundaries = Boundaries(module, None)
    boundaries.sites[0].open(lambda tensors: tensors)
    with pytest.raises(BoundaryError, match="Boundary '0' was given no tensor, but str"):
        module("text")
