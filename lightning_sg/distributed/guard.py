"""Runs the user's hooks in stages that have no loss and no outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from lightning_sg.distributed.elsewhere import ElsewhereError, in_place_of
from lightning_sg.distributed.hooks import EVALUATIONS
from lightning_sg.distributed.status import ProcessStatus
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import Callback
from lightning_sg.transport import ProcessGrid

# Hooks in which results of steps are commonly used.
_ENDS = ("on_train_epoch_end", *(f"on_{stage}_{part}_end" for stage in EVALUATIONS for part in ("batch", "epoch")))
#: The hooks to guard, each with what it may raise where it has no results.
GUARDED: dict[str, type[Exception]] = {
    "on_before_backward": ElsewhereError,
    "on_train_batch_end": Exception,
    **dict.fromkeys(_ENDS, Exception),
}
# Those that are given a loss, or outputs with a loss, after the trainer and the module that callbacks are given.
_GIVEN_LOSS = ("on_before_backward", "on_train_batch_end")


class HookGuard:
    """Ends a hook early, with a warning, where it needs what only the last stage has.

    Args:
        grid: The processes.
        status: Names this process.
    """

    def __init__(self, grid: ProcessGrid, status: ProcessStatus) -> None:
        self._grid = grid
        self._status = status
        self._warned: set[str] = set()

    def guarded(self, hook: Callable[..., Any], name: str, owner: object) -> Callable[..., None]:
        """What to run in the place of a hook.

        Args:
            hook: The hook.
            name: Its name, one of :data:`GUARDED`.
            owner: The module or callback that has it.
        """
        if self._grid.is_last:
            return hook
        full_name = f"{type(owner).__name__}.{name}"
        place = 2 if isinstance(owner, Callback) else 0

        def run(*arguments: Any) -> None:
            given = list(arguments)
            if name in _GIVEN_LOSS:
                given[place] = in_place_of(given[place], self._grid.device)
            try:
                hook(*given)
            except SyntheticGradientsError:
                raise
            except GUARDED[name] as error:  # the user's code: anything may come
                self._warn(full_name, error)

        return run

    def _warn(self, name: str, error: Exception) -> None:
        if name in self._warned:
            return
        self._warned.add(name)
        warnings.warn(
            f"{name} raised {type(error).__name__} ({error}) in {self._status.name}, where a step has no loss and no "
            "outputs; it goes on there without the rest of the hook, which ran whole in the last stage. If the rest "
            "matters to every stage, put what failed in `if trainer.is_global_zero:`.",
            stacklevel=2,
        )


__all__ = ["GUARDED", "HookGuard"]
