"""Finds the hooks that are the user's: of the module, and of callbacks that are not Lightning's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_sg.lightning_api import pl

#: What there is besides training, as the names of hooks have it.
EVALUATIONS = ("validation", "test", "predict")
_NOT_THE_USERS = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_sg")


def is_users(owner: object, hook: str) -> bool:
    """Whether a module or callback has a hook that is neither Lightning's nor this package's.

    Args:
        owner: The module or callback.
        hook: The name of the hook.
    """
    if hook in vars(owner):  # as LambdaCallback has them
        return True
    kind = next((kind for kind in type(owner).__mro__ if hook in vars(kind)), None)
    return kind is not None and kind.__module__.partition(".")[0] not in _NOT_THE_USERS


def users_callbacks(trainer: pl.Trainer, hook: str) -> list[Any]:
    """The callbacks in which a hook is the user's."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if is_users(callback, hook)]


def users_hooks(trainer: pl.Trainer, module: pl.LightningModule, hooks: Iterable[str]) -> list[str]:
    """Those hooks that the user has anywhere.

    Args:
        trainer: Has the callbacks.
        module: The module.
        hooks: The names of the hooks to look for.
    """
    return [hook for hook in hooks if is_users(module, hook) or users_callbacks(trainer, hook)]


__all__ = ["EVALUATIONS", "is_users", "users_callbacks", "users_hooks"]
