"""Objects of Python as bytes, for other processes: what is read back runs no code."""

from __future__ import annotations

import io
import json
import re
from pathlib import PosixPath, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.words import first_line

_PLAIN, _TORCH = b"j", b"t"
#: Paths and numpy's arrays and numbers, beside what torch allows itself; none of them runs code when it is made.
_ALLOWED: list[Any] = [
    PosixPath,
    PurePosixPath,
    np.ndarray,
    np.dtype,
    np.array(0).__reduce__()[0],
    np.float64(0).__reduce__()[0],
    *{type(np.dtype(kind)) for kind in np.typecodes["All"]},
]


def pack(value: Any) -> Tensor:
    """An object as bytes.

    Args:
        value: Tensors, numbers, strings, paths and ``None``, in any nesting of dicts, lists, tuples and sets: what
            ``torch.load(weights_only=True)`` reads.

    Returns:
        A uint8 tensor on the CPU.

    Raises:
        SyntheticGradientsError: For an object of another type.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        data = _PLAIN + json.dumps(value).encode()
    else:
        stream = io.BytesIO()
        try:
            torch.save(value, stream)
        except Exception as error:  # whatever an object's own code raises
            raise SyntheticGradientsError(
                f"An object of type {type(value).__name__} cannot be sent to the other processes ({error}). Send "
                "tensors, numbers, strings or containers of them."
            ) from error
        data = _TORCH + stream.getvalue()
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if data[:1] == _TORCH:
        _check(packed, value)
    return packed


def unpack(packed: Tensor) -> Any:
    """The inverse of :func:`pack`.

    Raises:
        SyntheticGradientsError: If the bytes stand for an object of a type that is not allowed.
    """
    data = packed.numpy().tobytes()
    if data[:1] == _PLAIN:
        return json.loads(data[1:])
    with torch.serialization.safe_globals(_ALLOWED):
        try:
            return torch.load(io.BytesIO(data[1:]), map_location="cpu", weights_only=True)
        except Exception as error:
            raise SyntheticGradientsError(
                f"Another process sent {_refused(error)}, which is not read, as reading it could run code."
            ) from error


def _check(packed: Tensor, value: Any) -> None:
    """Refuses in the sender what the receivers would refuse."""
    try:
        unpack(packed)
    except SyntheticGradientsError as error:
        refused = _refused(error.__cause__ or error)
        raise SyntheticGradientsError(
            f"{refused} (in a {type(value).__name__}) cannot be sent to the other processes, as "
            "reading it could run code. They take tensors, arrays, numbers, strings, paths and None, in dicts, lists, "
            "tuples and sets: send those, such as a state_dict in the place of a module, or allow the type in every "
            "process by `torch.serialization.add_safe_globals`."
        ) from error


def _refused(error: BaseException) -> str:
    """What torch refused to read, from its message."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"an object of type {found[1]}" if found else f"an object that torch cannot read ({first_line(error)})"


__all__ = ["pack", "unpack"]
