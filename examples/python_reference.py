"""Python's reference manual byte by byte: half a megabyte of English and code that comes with every Python."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor

from examples.shakespeare import Text

BYTES = 256


class PythonReference(Text):
    """The chapters that Python's ``help`` shows, in their alphabetical order; each version of Python has its own.

    Takes the arguments of :class:`examples.shakespeare.Text`.
    """

    def text(self) -> Tensor:
        """The whole text as UTF-8, int64 ``(L,)``, each from 0 to 255."""
        text = "".join(topics[name] for name in sorted(topics))
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
