"""Keeps values that another stage computes out of the logs of this one."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

from lightning_sg.distributed.status import ProcessStatus
from lightning_sg.lightning_api import pl
from lightning_sg.partition.fakes import is_fake
from lightning_sg.partition.shadow import shadowed


class LogsOfStage:
    """Lets the module log what this process has values of, and says once what it has not.

    Args:
        module: The module.
        status: Names this process.
    """

    def __init__(self, module: pl.LightningModule, status: ProcessStatus) -> None:
        self._module = module
        self._status = status
        self._warned: set[str] = set()
        self._missing: list[str] = []

    def take_missing(self) -> list[str]:
        """The names of what was not logged and has just been warned of."""
        missing, self._missing = self._missing, []
        return missing

    def without_fakes(self) -> AbstractContextManager[None]:
        """While entered, the module's ``log`` and ``log_dict`` leave fake tensors out."""
        log, log_dict = self._module.log, self._module.log_dict

        def log_known(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if self._known(name, value):
                log(name, value, *args, **kwargs)

        def log_dict_known(dictionary: Any, *args: Any, **kwargs: Any) -> None:
            here = {name: value for name, value in dictionary.items() if self._known(name, value)}
            log_dict(here if len(here) < len(dictionary) else dictionary, *args, **kwargs)

        return shadowed([(self._module, "log", log_known), (self._module, "log_dict", log_dict_known)])

    def _known(self, name: str, value: Any) -> bool:
        if not is_fake(value):
            return True
        if name not in self._warned:
            self._warned.add(name)
            self._missing.append(name)
            warnings.warn(
                f"'{name}' is computed in another stage than {self._status.name} and is not logged. Log it behind the "
                "last boundary, or pass it through the boundary.",
                stacklevel=2,
            )
        return False


__all__ = ["LogsOfStage"]
