"""Fingerprints of batches, the random numbers of a stage, and a boundary without a callback."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_sg import Boundary, BoundaryError
from lightning_sg.batch.fingerprint import fingerprint
from lightning_sg.boundary import Boundaries
from lightning_sg.rng import StepRandomness, random_state, set_random_state, unchanged_randomness
from tests.models import Classifier, assert_same_state, dataset

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8)
CPU = torch.device("cpu")


def changed(tensor: Tensor, place: tuple[int, ...]) -> Tensor:
    tensor = tensor.clone()
    tensor[place] += 1
    return tensor


# ---------------------------------------------------------------------- fingerprints


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


# ---------------------------------------------------------------------- random numbers


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def steps(position: int, count: int = 1, diverge: bool = False, seeded: int = 1) -> list[float]:
    """What a process draws in its first steps."""
    seed(seeded)
    randomness = StepRandomness(position, CPU)
    drawn: list[float] = []
    for _ in range(count):
        with randomness:
            if diverge:
                randomness.diverge()
            drawn += draw()
        draw()
    return drawn


def test_outside_a_step_it_is_as_if_nothing_had_been_drawn() -> None:
    seed(1)
    expected = draw(), draw()
    seed(1)
    randomness = StepRandomness(0, CPU)
    with randomness:
        draw()
    first = draw()
    with randomness:
        randomness.diverge()
        draw()
    assert (first, draw()) == expected
    assert torch.initial_seed() == 1


def test_a_step_begins_with_the_same_numbers_in_every_process() -> None:
    assert steps(0, count=3) == steps(2, count=3)


def test_at_its_own_stages_each_process_draws_numbers_of_its_own() -> None:
    drawn = [steps(0), *(steps(position, diverge=True) for position in range(3))]
    for kind in zip(*drawn):
        assert len(set(kind)) == 4


def test_every_step_draws_other_numbers_and_none_draws_those_outside() -> None:
    for diverge in (False, True):
        seed(1)
        drawn = [*draw(), *steps(0, count=3, diverge=diverge)]
        assert len(set(drawn)) == 12


def test_the_seed_decides_what_a_step_draws() -> None:
    assert steps(1, diverge=True) == steps(1, diverge=True)
    assert steps(1, diverge=True) != steps(1, diverge=True, seeded=2)
    assert steps(1) != steps(1, seeded=2)


def test_an_exception_in_a_step_leaves_the_numbers_outside_alone() -> None:
    seed(1)
    expected = draw()
    seed(1)

    def step() -> None:
        with StepRandomness(0, CPU):
            draw()
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        step()
    assert draw() == expected


def test_what_is_drawn_under_unchanged_randomness_does_not_count() -> None:
    seed(1)
    expected = draw()
    seed(1)
    with unchanged_randomness():
        assert draw() == expected
    assert draw() == expected


def test_all_generators_return_to_a_remembered_state() -> None:
    state = random_state()
    expected = draw()
    assert draw() != expected
    set_random_state(state)
    assert draw() == expected


# ---------------------------------------------------------------------- boundaries


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
    assert not module[0]._forward_hooks


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
