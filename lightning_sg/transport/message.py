"""What neighbouring stages tell each other, and its form on the wire."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sg.transport.compression import Coding, coding_for, decode, empty_parts, encode

Kind = Literal["batch", "end", "failed"]

#: Bytes of the first part of every message. What does not fit follows as a part of its own.
HEAD_BYTES = 1024
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorSpec:
    """The form of one tensor that follows a message's head."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False
    order: tuple[int, ...] = ()
    coding: Coding = "full"

    @classmethod
    def of(cls, tensor: Tensor, coding: Coding = "full") -> TensorSpec:
        """The form of ``tensor``, and how it is to travel."""
        kind = str(tensor.dtype).removeprefix("torch.")
        return cls(tuple(tensor.shape), kind, tensor.requires_grad, dense(tensor)[1], coding_for(tensor.dtype, coding))

    @property
    def _sent_shape(self) -> list[int]:
        return [self.shape[place] for place in self.order]

    @property
    def _type(self) -> torch.dtype:
        kind: torch.dtype = getattr(torch, self.dtype)
        return kind

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """What is sent of a tensor of this form: contiguous tensors, the dimensions in the order of memory."""
        return encode(dense(tensor.detach())[0].contiguous(), self.coding)

    def empty(self, device: torch.device) -> list[Tensor]:
        """Tensors to receive :meth:`parts` into; see :meth:`arrange`."""
        return empty_parts(self._sent_shape, self._type, self.coding, device)

    def arrange(self, received: list[Tensor]) -> Tensor:
        """What was sent, with its dimensions in their places and its layout in memory."""
        places = [self.order.index(dimension) for dimension in range(len(self.order))]
        return decode(received, self._sent_shape, self._type, self.coding).permute(places)


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
    """One message from a stage to its neighbour: one for every batch, and upwards some exact gradients.

    Attributes:
        kind: ``"batch"``; ``"end"`` after the last one; or ``"failed"`` when the sender stops with an error.
        number: Counts the batches of a run, of training and evaluation together; negative for an exact gradient.
        step: The sender's words for what it is doing, for error messages: "training batch 17".
        fingerprint: Of the batch that the sender was given, to tell different batches.
        wants_target: Downwards: whether the sender's predictor learns from this batch.
        stop: Upwards: the sender asks for an end of the training.
        ends: Downwards: the number of the training batch after which training ends, or ``None`` for not yet.
        figures: Downwards: the boundaries' figures, on their way to the loggers.
        reason: Why the sender failed.
        specs: The forms of the tensors that follow.
        tensors: The activations (downwards) or their targets (upwards).
        coding: How the tensors are to travel.
    """

    kind: Kind = "batch"
    number: int = 0
    step: str = ""
    fingerprint: int = 0
    wants_target: bool = False
    stop: bool = False
    ends: int | None = None
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    reason: str = ""
    specs: list[TensorSpec] = field(default_factory=list)
    tensors: Sequence[Tensor] = ()
    coding: Coding = "full"

    def __post_init__(self) -> None:
        if self.tensors:
            self.specs = [TensorSpec.of(tensor, self.coding) for tensor in self.tensors]

    def encode(self) -> tuple[Tensor, Tensor | None]:
        """The head, :data:`HEAD_BYTES` long, and what did not fit into it; both uint8 on the CPU."""
        content = {key: value for key, value in self.__dict__.items() if key != "tensors"}
        content["specs"] = [asdict(spec) for spec in self.specs]
        text = json.dumps(content).encode()
        room = HEAD_BYTES - _LENGTH_BYTES
        head = bytearray(HEAD_BYTES)
        head[:_LENGTH_BYTES] = len(text).to_bytes(_LENGTH_BYTES, "little")
        head[_LENGTH_BYTES : _LENGTH_BYTES + min(len(text), room)] = text[:room]
        rest = torch.frombuffer(bytearray(text[room:]), dtype=torch.uint8) if len(text) > room else None
        return torch.frombuffer(head, dtype=torch.uint8), rest

    @staticmethod
    def rest_bytes(head: Tensor) -> int:
        """How many bytes follow the head, from the head."""
        length = int.from_bytes(head[:_LENGTH_BYTES].numpy().tobytes(), "little")
        return max(0, length - (HEAD_BYTES - _LENGTH_BYTES))

    @staticmethod
    def decode(head: Tensor, rest: Tensor | None) -> Message:
        """The inverse of :meth:`encode`; the tensors have yet to come."""
        data = head.numpy().tobytes()
        length = int.from_bytes(data[:_LENGTH_BYTES], "little")
        text = data[_LENGTH_BYTES:] + (rest.numpy().tobytes() if rest is not None else b"")
        content: dict[str, Any] = json.loads(text[:length])
        content["specs"] = [
            TensorSpec(**{**spec, "shape": tuple(spec["shape"]), "order": tuple(spec["order"])})
            for spec in content["specs"]
        ]
        return Message(**content)


__all__ = ["HEAD_BYTES", "Kind", "Message", "TensorSpec", "dense"]
