"""Names of this package's actions in Lightning's profilers, and the kind of work that an action is."""

from __future__ import annotations

from functools import cache

_PREFIX = "[SyntheticGradients]"

START_UP = f"{_PREFIX}trace a first step and place the stages"
FAKE_TENSORS = f"{_PREFIX}run earlier stages on fake tensors"
PREDICT = f"{_PREFIX}predict"
LEARN = f"{_PREFIX}learn"
EXACT = f"{_PREFIX}backpropagate an exact gradient"
SEND = f"{_PREFIX}send"
WAIT_ACTIVATIONS = f"{_PREFIX}wait for activations"
WAIT_TARGET = f"{_PREFIX}wait for a target"
WAIT_EXACT = f"{_PREFIX}wait for an exact gradient"

#: Lightning's action for one whole training batch.
BATCH = "run_training_batch"
#: Lightning's action for a whole epoch: its batches and its validation.
EPOCH = "run_training_epoch"

#: Each kind of work, with the action names (or ends of names) that belong to it. In nested actions the innermost
#: decides. Everything else is Lightning's own work: loops, hooks, logging.
KINDS: dict[str, tuple[str, ...]] = {
    "compute": (".training_step", ".backward", ".optimizer_step", ".optimizer_zero_grad", ".lr_scheduler_step"),
    "predictor": (PREDICT, LEARN),
    "exact": (EXACT,),
    "wait": (WAIT_ACTIVATIONS, WAIT_TARGET, WAIT_EXACT),
    "send": (SEND,),
    "fake tensors": (FAKE_TENSORS,),
    "start-up": (START_UP,),
    "data": ("_dataloader_next", ".batch_to_device"),
}
LIGHTNING = "Lightning"


@cache
def kind_of(action: str) -> str:
    """The kind of work that an action is: a key of :data:`KINDS`, or :data:`LIGHTNING`."""
    return next((kind for kind, ends in KINDS.items() if action.endswith(ends)), LIGHTNING)


__all__ = [
    "BATCH",
    "EPOCH",
    "EXACT",
    "FAKE_TENSORS",
    "KINDS",
    "LEARN",
    "LIGHTNING",
    "PREDICT",
    "SEND",
    "START_UP",
    "WAIT_ACTIVATIONS",
    "WAIT_EXACT",
    "WAIT_TARGET",
    "kind_of",
]
