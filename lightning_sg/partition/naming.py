"""Names the loss that is being computed, by the functions that compute it."""

from __future__ import annotations

import sys

from lightning_sg.lightning_api import pl

# How many calls up a function is looked for that says what loss it is.
_FRAMES = 12


def loss_around() -> str:
    """The name of the loss that is being computed, such as ``StudentT.log_prob``; ``""`` if no function says so."""
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_back is None:
            break
        frame = frame.f_back
        name, module = frame.f_code.co_name, frame.f_globals.get("__name__", "")
        if module == "lightning_sg.partition.step":
            break
        if name != "log_prob" and "loss" not in name.lower():
            continue
        if module.startswith(("torch.nn.", "lightning_sg.")):
            continue
        owner = frame.f_locals.get("self")
        return name if owner is None or isinstance(owner, pl.LightningModule) else f"{type(owner).__name__}.{name}"
    return ""


__all__ = ["loss_around"]
