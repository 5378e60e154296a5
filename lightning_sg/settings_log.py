"""Writes into every logger's config, once, what a run was set to and what was chosen at each boundary."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_sg.lightning_api import pl
from lightning_sg.session import Session

#: The key under which all of it stands in the config.
KEY = "sg"

#: Arguments of the strategy that are Lightning's, or say nothing about the training.
_LEFT_OUT = ("parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin", "accelerator", "kwargs")


class SettingsLog:
    """Logs the settings of a run when its first step has been traced, which shows what was chosen."""

    def __init__(self) -> None:
        self._done_for: Any = None

    def write(self, trainer: pl.Trainer, session: Session) -> None:
        """Logs them, unless that is done or there is nothing to say yet."""
        if self._done_for is session or session.trace is None or not session.trainers:
            return
        self._done_for = session
        config = {KEY: {**as_config(session.settings), **_strategy(trainer), "boundaries": _boundaries(session)}}
        for logger in trainer.loggers:  # they write on rank zero alone
            logger.log_hyperparams(config)


def _boundaries(session: Session) -> dict[str, Any]:
    """What predicts at each boundary, and the size of the stage that ends there.

    A process knows what was chosen at its own boundaries; of the others, it knows what the user has said.
    """
    trace = session.trace
    assert trace is not None
    templates = session.factory.templates(trace.order)
    sizes = {name: parameter.numel() for name, parameter in session.module.named_parameters()}
    found: dict[str, Any] = {}
    for stage, name in enumerate(trace.order):
        trainer: Any = session.trainers[name]
        choice = getattr(getattr(trainer, "predictor", None), "choice", None) if session.ownership.owns(name) else None
        size = sum(sizes.get(used, 0) for used, stages in trace.uses.items() if stage in stages)
        found[name] = {"predictor": choice or type(templates[name]).__name__, "stage_parameters": size}
    return found


def _strategy(trainer: pl.Trainer) -> dict[str, Any]:
    """The options of this package's strategy, if the trainer has it."""
    strategy: Any = trainer.strategy
    if not type(strategy).__module__.startswith("lightning_sg."):
        return {}
    return {"strategy": {**_options(strategy, _LEFT_OUT), "devices": getattr(strategy, "num_processes", 1)}}


def as_config(value: Any) -> Any:
    """A value as numbers, strings, lists and dicts, which every logger can write."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_config(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_config(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_config(each) for each in value]
    if inspect.isroutine(value) or isinstance(value, type):
        return getattr(value, "__qualname__", str(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return {"class": type(value).__name__, **_options(value)}


def _options(value: Any, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments that an object was made with, as far as it keeps them under their names."""
    names = [name for name in inspect.signature(type(value).__init__).parameters if name not in ("self", *left_out)]
    kept = {name: getattr(value, name) for name in names if name in getattr(value, "__dict__", {})}
    return {name: as_config(each) for name, each in kept.items() if not isinstance(each, nn.Module)}


__all__ = ["KEY", "SettingsLog", "as_config"]
