"""The names under which this package's own work appears in Lightning's profilers, beside Lightning's own actions."""

from __future__ import annotations

_PREFIX = "[SyntheticGradients]"

START_UP = f"{_PREFIX}follow a first step and place the stages"
GHOSTS = f"{_PREFIX}run without data up to the own stages"
PREDICT = f"{_PREFIX}predict"
LEARN = f"{_PREFIX}learn"
EXACT = f"{_PREFIX}take an exact gradient on"
SEND = f"{_PREFIX}send"
WAIT_ACTIVATIONS = f"{_PREFIX}wait for activations"
WAIT_TARGET = f"{_PREFIX}wait for a target"
WAIT_EXACT = f"{_PREFIX}wait for an exact gradient"

#: Lightning's action for all of one training batch.
BATCH = "run_training_batch"
#: Lightning's action around the batches of an epoch, and its validation.
EPOCH = "run_training_epoch"

#: What kind of work an action is, by its name or the end of its name; the innermost action decides. What is in none
#: of them is Lightning's own: loops, hooks, logging.
KINDS: dict[str, tuple[str, ...]] = {
    "compute": (".training_step", ".backward", ".optimizer_step", ".optimizer_zero_grad", ".lr_scheduler_step"),
    "predictor": (PREDICT, LEARN),
    "exact": (EXACT,),
    "wait": (WAIT_ACTIVATIONS, WAIT_TARGET, WAIT_EXACT),
    "send": (SEND,),
    "ghosts": (GHOSTS,),
    "start-up": (START_UP,),
    "data": ("_dataloader_next", ".batch_to_device"),
}
LIGHTNING = "Lightning"


def kind_of(action: str) -> str:
    """The kind of work that an action is, one of :data:`KINDS` or :data:`LIGHTNING`."""
    return next((kind for kind, ends in KINDS.items() if action.endswith(ends)), LIGHTNING)


__all__ = [
    "BATCH",
    "EPOCH",
    "EXACT",
    "GHOSTS",
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
