"""A batch that a stage cannot work on, as one before it was started anew and has no activations of it."""

from __future__ import annotations


class BatchSkipped(BaseException):
    """Leaves the user's step where activations would come in; no ``except Exception`` of theirs stops it."""


__all__ = ["BatchSkipped"]
