"""What predictors are told about a batch."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch

from lightning_sg import SyntheticGradientsError
from lightning_sg.batch.context import context_of

X, Y, Z = torch.randn(4, 3), torch.arange(4), torch.ones(4)
Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, Z),
        Pair(X, Y),
        *({"x": X, key: Y} for key in ("labels", "label", "targets", "target", "y")),
    ],
    ids=["tuple", "list", "triple", "named tuple", "labels", "label", "targets", "target", "y"],
)
def test_auto_finds_the_labels(batch: Any) -> None:
    assert torch.equal(context_of(batch, "auto"), Y)


def test_auto_prefers_the_plainer_of_two_names() -> None:
    assert torch.equal(context_of({"y": Z, "target": Z, "labels": Y}, "auto"), Y)


@pytest.mark.parametrize(
    "batch",
    [X, (X,), (X, "text"), {"x": X}, [], None, "ab"],
    ids=["tensor", "one", "text", "dict", "empty", "none", "str"],
)
def test_auto_finds_nothing_where_there_are_no_labels(batch: Any) -> None:
    assert context_of(batch, "auto") is None


def test_none_means_no_context() -> None:
    assert context_of((X, Y), None) is None


@pytest.mark.parametrize(
    ("batch", "source"), [((X, Z, Y), 2), ((X, Y), -1), ({"x": X, "digit": Y}, "digit"), ({"x": X, 7: Y}, 7)]
)
def test_a_key_or_an_index_is_looked_up(batch: Any, source: Any) -> None:
    assert torch.equal(context_of(batch, source), Y)


def test_a_function_is_called_with_the_batch() -> None:
    assert torch.equal(context_of({"a": {"b": Y}}, lambda batch: batch["a"]["b"] + 1), Y + 1)


def test_the_context_is_detached_at_any_depth() -> None:
    carrier = torch.ones(2, requires_grad=True) * 2
    context = context_of((X, carrier), lambda batch: {"deep": [batch[1], "kept"]})
    assert context["deep"][1] == "kept"
    assert not context["deep"][0].requires_grad
    assert torch.equal(context["deep"][0], carrier)


@pytest.mark.parametrize(
    ("batch", "source", "seen"),
    [
        ({"x": X, "y": Y}, "label", r"keys \['x', 'y'\]"),
        ((X, Y), 2, "tuple"),
        ((X, Y), "label", "tuple"),
        (3, 0, "int"),
    ],
)
def test_an_entry_that_the_batch_does_not_have_is_an_error_that_says_what_it_has(
    batch: Any, source: Any, seen: str
) -> None:
    message = rf"SyntheticGradients\(context={source!r}\): the batch has no such entry \({seen}\)"
    with pytest.raises(SyntheticGradientsError, match=message):
        context_of(batch, source)
