"""Has the optimizers, schedules and loggers of a trainer do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_sg.lightning_api import DummyLogger
from lightning_sg.partition.shadow import shadowed


@contextmanager
def idle(module: nn.Module) -> Iterator[None]:
    """Keeps what a step does to its trainer from having an effect inside the context, and undoes what it sets.

    Optimizers and learning-rate schedules make no step, and a closure that an optimizer is given is called once.
    Loggers write nothing. Options of parameter groups and attributes of the trainer are restored.

    Args:
        module: The LightningModule; one without a trainer is left alone.
    """
    trainer: Any = getattr(module, "_trainer", None)
    if trainer is None:
        yield
        return
    attributes = dict(trainer.__dict__)
    groups = [(group, dict(group)) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    trainer.loggers = [DummyLogger() for _logger in trainer.loggers]
    try:
        with shadowed(_shadows(module, trainer)):
            yield
    finally:
        for group, before in groups:
            group.clear()
            group.update(before)
        trainer.__dict__.clear()
        trainer.__dict__.update(attributes)


def _shadows(module: Any, trainer: Any) -> list[tuple[Any, str, Any]]:
    optimizers = list(trainer.optimizers)
    if optimizers:
        wrapped = module.optimizers()
        optimizers += wrapped if isinstance(wrapped, list) else [wrapped]
    schedulers = [each.scheduler for each in trainer.lr_scheduler_configs]
    by_id = {id(optimizer): optimizer for optimizer in optimizers}.values()
    return [
        *((optimizer, "step", _only_closure) for optimizer in by_id),
        *((optimizer, "zero_grad", _nothing) for optimizer in by_id),
        *((scheduler, "step", _nothing) for scheduler in schedulers),
    ]


def _only_closure(closure: Callable[[], Any] | None = None, *_args: Any, **_kwargs: Any) -> Any:
    return None if closure is None else closure()


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    pass


__all__ = ["idle"]
