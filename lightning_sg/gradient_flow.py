"""Whether gradients flow back through a boundary, and if not, why."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum

import torch
import torch.utils.checkpoint
from torch import Tensor

from lightning_sg._compat import goes_backward
from lightning_sg.errors import BoundaryError

_CHECKPOINT = torch.utils.checkpoint.__file__


class Blocked(Enum):
    """Why no gradient flows back: what was seen at the boundary, and what to do about it."""

    INFERENCE_MODE = (
        "was reached under `torch.inference_mode()`",
        "Call the model outside of it in training_step",
    )
    NO_GRAD = (
        "was reached under `torch.no_grad()`",
        "Call the model outside of it in training_step",
    )
    INTEGERS = (
        "was given integers only, which carry no gradient",
        "Move it before the activations are rounded (argmax, `.long()`), or pass what they were made from through it, "
        "too",
    )
    DETACHED = (
        "was given tensors that are detached from the parameters before it (by `.detach()`, `.data`, or a `no_grad` or "
        "`inference_mode` block around that stage)",
        "Take that out",
    )
    CHECKPOINTED = (
        "was reached inside activation checkpointing (torch.utils.checkpoint), which runs its part of the network a "
        "second time in the backward pass, when the next stage has long gone on",
        "Checkpoint the layers between boundaries, each stage on its own, and leave the boundary outside",
    )

    def __init__(self, seen: str, advice: str) -> None:
        self.seen = seen
        self.advice = advice

    @property
    def of_whole_pass(self) -> bool:
        """Whether gradients are switched off, whatever tensors reach the boundary, as in evaluation."""
        return self in (Blocked.NO_GRAD, Blocked.INFERENCE_MODE)


def blocked(tensors: Sequence[Tensor]) -> Blocked | None:
    """Says why no gradient flows back to tensors that reach a boundary now; ``None`` if one does."""
    if not torch.is_grad_enabled() and checkpointed():
        return Blocked.CHECKPOINTED
    if torch.is_inference_mode_enabled():
        return Blocked.INFERENCE_MODE
    if not torch.is_grad_enabled():
        return Blocked.NO_GRAD
    if any(tensor.requires_grad for tensor in tensors):
        return None
    if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
        return Blocked.INTEGERS
    return Blocked.DETACHED


def checkpointed() -> bool:
    """Whether the code that runs now is inside ``torch.utils.checkpoint``, in its forward pass."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def refuse_recomputation(boundary: str) -> None:
    """Refuses a forward pass in a backward pass: activation checkpointing of any kind does that.

    Raises:
        BoundaryError: If a backward pass is going on.
    """
    if goes_backward():
        raise BoundaryError(f"Boundary '{boundary}' {Blocked.CHECKPOINTED.seen}. {Blocked.CHECKPOINTED.advice}.")


def never_trains(boundary: str, why: Blocked, stage: str) -> BoundaryError:
    """The error for a boundary through which no gradient flows.

    Args:
        boundary: Its name.
        why: What was seen.
        stage: The stage before it, in words.
    """
    lost = "" if why is Blocked.CHECKPOINTED else f", so {stage} gets no gradient and never trains"
    instead = "" if why is Blocked.CHECKPOINTED else ", or remove the boundary if that stage is not to train"
    return BoundaryError(f"Boundary '{boundary}' {why.seen}{lost}. {why.advice}{instead}.")


__all__ = ["Blocked", "blocked", "checkpointed", "never_trains", "refuse_recomputation"]
