"""What processes tell each other: it arrives as it was, and what could run code is refused on both sides."""

from __future__ import annotations

import datetime
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.objects import pack, unpack

VALUES: list[Any] = [
    None,
    True,
    -3,
    0.1 + 0.2,
    float("inf"),
    "grün 試験",
    (1, None, "a"),
    [],
    {"a": [1, (2.5, "b")], 3: {4, 5}},
    OrderedDict(x=1),
    Path("folder/last.ckpt"),
    {"step": np.int64(4), "loss": np.float32(0.5)},
    b"bytes",
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_arrives_as_it_was(value: Any) -> None:
    found = unpack(pack(value))
    assert found == value
    assert type(found) is type(value)


def test_tensors_and_arrays_arrive() -> None:
    found = unpack(pack({"weights": torch.arange(3.0), "array": np.arange(6).reshape(2, 3)}))
    assert torch.equal(found["weights"], torch.arange(3.0))
    assert np.array_equal(found["array"], np.arange(6).reshape(2, 3))


class Own:
    """A type of a user's."""


@pytest.mark.parametrize("value", [Own(), {"a": [Own()]}, datetime.timedelta(1), lambda: 1, open])
def test_what_could_run_code_is_refused_where_it_is_sent(value: Any) -> None:
    with pytest.raises(SyntheticGradientsError, match="cannot be sent to the other processes"):
        pack(value)


def test_an_allowed_type_arrives() -> None:
    with torch.serialization.safe_globals([Own]):
        assert isinstance(unpack(pack({"a": Own()}))["a"], Own)


class Planted:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_planted_object_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for data in (pickle.dumps(Planted(mark)), b"not a pickle"):
        packed = torch.frombuffer(bytearray(b"t" + data), dtype=torch.uint8)
        with pytest.raises(SyntheticGradientsError, match="Another process sent"):
            unpack(packed)
    assert not mark.exists()
