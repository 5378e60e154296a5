"""What neighbouring stages tell each other, and its form on the wire."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_sg._compat import FakeTensor
from lightning_sg.errors import PartitionError
from lightning_sg.transport.compression import Compression, compress, compression_for, decompress, empty_parts


@dataclass(frozen=True)
class TensorSpec:
    """The form of one tensor that follows a message's head."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False
    order: tuple[int, ...] = ()
    compression: Compression = "full"

    @classmethod
    def of(cls, tensor: Tensor, compression: Compression = "full") -> TensorSpec:
        """The form of ``tensor``, and how it is to travel."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        chosen = compression_for(tensor.dtype, compression)
        return cls(tuple(tensor.shape), dtype, tensor.requires_grad, dense(tensor)[1], chosen)

    @property
    def _sent_shape(self) -> list[int]:
        return [self.shape[place] for place in self.order]

    @property
    def _type(self) -> torch.dtype:
        kind: torch.dtype = getattr(torch, self.dtype)
        return kind

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """What is sent of a tensor of this form: contiguous tensors, the dimensions in the order of memory."""
        return compress(dense(tensor.detach())[0].contiguous(), self.compression)

    def empty(self, device: torch.device) -> list[Tensor]:
        """Tensors to receive :meth:`parts` into; see :meth:`arrange`."""
        return empty_parts(self._sent_shape, self._type, self.compression, device)

    def arrange(self, received: list[Tensor]) -> Tensor:
        """The tensor that was sent, with its dimensions in their places and its layout in memory."""
        places = [self.order.index(dimension) for dimension in range(len(self.order))]
        return decompress(received, self._sent_shape, self._type, self.compression).permute(places)


def dense(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor with its dimensions in the order in which they lie in memory, and that order.

    Transposed and channels-last tensors keep their layout on the way: ``view`` works in one process if it works in two.
    """
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.ndim), key=strides.__getitem__, reverse=True))
    permuted = tensor.permute(order)
    if permuted.is_contiguous():
        return permuted, order
    return tensor, tuple(range(tensor.ndim))


@dataclass
class Message:
    """What all messages have.

    Attributes:
        number: Of the batch; training and evaluation count together.
        doing: What the sender is doing, in words, for error messages: "training batch 17".
        tensors: The tensors that follow the head.
        specs: Their forms.
        compression: How they travel.
    """

    number: int = 0
    doing: str = ""
    tensors: Sequence[Tensor] = ()
    specs: list[TensorSpec] = field(default_factory=list)
    compression: Compression = "full"

    def __post_init__(self) -> None:
        if any(isinstance(tensor, FakeTensor) for tensor in self.tensors):
            # The receiver would take the data of what comes next in its place.
            raise PartitionError(f"A tensor without data, of another stage, was to be sent in {self.doing}.")
        if self.tensors:
            self.specs = [TensorSpec.of(tensor, self.compression) for tensor in self.tensors]

    def encode(self) -> bytes:
        """All but the tensors, as text."""
        content = {key: value for key, value in self.__dict__.items() if key != "tensors"}
        content["specs"] = [asdict(spec) for spec in self.specs]
        return json.dumps({"type": type(self).__name__, **content}).encode()

    @staticmethod
    def decode(text: bytes) -> Message:
        """The inverse of :meth:`encode`; the tensors have yet to come."""
        content: dict[str, Any] = json.loads(text)
        content["specs"] = [
            TensorSpec(**{**spec, "shape": tuple(spec["shape"]), "order": tuple(spec["order"])})
            for spec in content["specs"]
        ]
        message: Message = _TYPES[content.pop("type")](**content)
        return message


@dataclass
class Activations(Message):
    """Downstream: what crosses a boundary, a message for each time that a batch crosses it.

    Attributes:
        crossing: How often the batch has crossed it before.
        ended: Where the sender's step has come to its end although the receiver's may not have: why it has. Else "".
        coupled: Whether the sender uses the target in place of a prediction.
        fingerprint: Of the sender's batch, to tell different batches.
        batches: How many batches the sender's data loader gives, or ``None`` if that is not known.
        last: Whether this is its last batch.
        wants_target: Whether the sender asks for the target of this batch.
        ends: The number of the training batch after which training ends, or ``None`` for not yet.
        metrics: Of the boundaries upstream, on their way to the loggers.
        skipped: Whether there are none, as a stage before was started anew meanwhile.
        owners: For parameters that no traced step has used, the processes that have used them since.
    """

    crossing: int = 0
    ended: str = ""
    coupled: bool = False
    fingerprint: int = 0
    batches: int | None = None
    last: bool = False
    wants_target: bool = False
    ends: int | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: bool = False
    owners: dict[str, int] = field(default_factory=dict)


@dataclass
class Target(Message):
    """Upstream: the answer to each batch that has crossed. Without tensors there is no target.

    Attributes:
        part: Where each backward pass of a batch is answered, the number of the answer.
        counts: For each crossing of the batch, how many of the tensors are its target; 0 for none.
        stop: Whether the sender asks for an end of the training.
        last: Whether the batch is the last of the sender's data loader.
    """

    part: int = 0
    counts: list[int] = field(default_factory=list)
    stop: bool = False
    last: bool = False


@dataclass
class Residual(Message):
    """Upstream, late: exact gradient minus the target that was sent. Without tensors the two are equal.

    Where stages apply exact gradients whole, it is the exact gradient, and without tensors there is none.

    Attributes:
        counts: For each crossing of the batch, how many of the tensors are its residual; 0 for none.
        missing: Whether the exact gradient is not known, as a stage was away.
    """

    counts: list[int] = field(default_factory=list)
    missing: bool = False


@dataclass
class Arrived(Message):
    """Both ways: the sender has come to a meeting of all stages, and sends nothing about batches until it is over.

    Attributes:
        what: What the stages meet for.
    """

    what: str = ""


@dataclass
class Gathering(Message):
    """Downstream, in a meeting: what the stages so far bring, a tensor each."""


@dataclass
class Gathered(Message):
    """Upstream, in a meeting: what all stages have brought, a tensor each."""


@dataclass
class Copy(Message):
    """Either way, in a meeting: a tensor of one stage on its way to all others."""


@dataclass
class Rejoined(Message):
    """Either way, first of all: the sender was started anew, and takes part from batch ``number`` on."""


@dataclass
class Saved(Message):
    """Either way: the sender needs nothing of meeting ``number`` and those before it again, even started anew."""


@dataclass
class Alive(Message):
    """Either way, from time to time: the sender's process runs.

    Attributes:
        waits: Whether the sender is waiting for a neighbour.
    """

    waits: bool = False


@dataclass
class End(Message):
    """The last message of a process that ends in good order."""


@dataclass
class Failed(Message):
    """The last message of a process that stops with an error.

    Attributes:
        reason: The error, in words.
    """

    reason: str = ""


#: What is sent about batches.
OF_BATCHES = (Activations, Target, Residual)
_MOST_COPIES = 1 << 32  # in one meeting


def number_of_copy(meeting: int, place: int) -> int:
    """The number of a :class:`Copy`: the meeting's, and its place there."""
    return meeting * _MOST_COPIES + place


def meeting_of(message: Message) -> int:
    """The number of the meeting that a message belongs to; 0 for none."""
    if isinstance(message, Copy):
        return message.number // _MOST_COPIES
    return message.number if isinstance(message, (Gathering, Gathered)) else 0


def place_of(message: Message) -> int:
    """Which of several messages of its type and number a message is: the crossing, or the part of an answer."""
    if isinstance(message, Activations):
        return message.crossing
    return message.part if isinstance(message, Target) else 0


def split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """The tensors of each crossing, from those of all."""
    remaining = iter(tensors)
    return [tuple(next(remaining) for _ in range(count)) for count in counts]


_KINDS = (
    Activations,
    Target,
    Residual,
    Arrived,
    Gathering,
    Gathered,
    Copy,
    Rejoined,
    Saved,
    Alive,
    End,
    Failed,
)
_TYPES: dict[str, type[Message]] = {kind.__name__: kind for kind in _KINDS}

__all__ = [
    "OF_BATCHES",
    "Activations",
    "Alive",
    "Arrived",
    "Copy",
    "End",
    "Failed",
    "Gathered",
    "Gathering",
    "Message",
    "Rejoined",
    "Residual",
    "Saved",
    "Target",
    "TensorSpec",
    "dense",
    "meeting_of",
    "number_of_copy",
    "place_of",
    "split",
]
