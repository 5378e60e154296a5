"""Undoes what a step changes, in its module and around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_sg.partition.idle import idle
from lightning_sg.partition.quiet import RunMetric, quiet, run_no_metric
from lightning_sg.partition.snapshot import Snapshot
from lightning_sg.partition.written import Written
from lightning_sg.rng import unchanged_randomness


@contextmanager
def undone(module: nn.Module, device: torch.device, run_metric: RunMetric = run_no_metric) -> Iterator[None]:
    """Lets a step run without a trace of it on exit.

    These are restored: attributes of ``module``, its submodules, its callbacks and data module, and of the objects that
    they hold; contents of lists, dicts, sets and deques in them; values of tensors, and of arrays up to 256 MiB;
    ``requires_grad`` and ``grad`` of parameters; random numbers, also those of generators of the user's; the gradient
    mode, autocast and the default dtype. An iterator gives what the step has taken from it again. Nothing is logged, no
    metric counts, and optimizers and schedules make no step.

    What the module does not lead to, such as variables of the program and files, stays as the step leaves it.

    Args:
        module: The module whose step runs.
        device: The device that it runs on.
        run_metric: Computes the value of a metric that is a loss.
    """
    snapshot = Snapshot([module, *module.modules(), *_around(module)])
    parameters = {id(each): each for held in snapshot.modules for each in held.parameters(recurse=False)}.values()
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    written = Written()
    with ExitStack() as stack:
        stack.callback(snapshot.restore)
        stack.callback(_restore_parameters, before)
        stack.callback(written.restore)
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(unchanged_randomness())
        stack.enter_context(_unchanged_modes(device))
        stack.enter_context(idle(module))
        stack.enter_context(quiet(module, snapshot.modules, run_metric))
        stack.enter_context(written)
        yield


def _around(module: nn.Module) -> list[Any]:
    """What else of the user's a step reaches through its trainer."""
    trainer: Any = getattr(module, "_trainer", None)
    return [] if trainer is None else [*trainer.callbacks, trainer.datamodule]


def _restore_parameters(before: list[tuple[nn.Parameter, bool, torch.Tensor | None]]) -> None:
    # Optimizers hold the real parameters, so `toggle_optimizer` freezes those even where fake tensors stand for them,
    # and a step that ends early does not thaw them.
    for parameter, trainable, gradient in before:
        if parameter.requires_grad != trainable:
            parameter.requires_grad_(trainable)
        if parameter.grad is not gradient:
            parameter.grad = gradient


@contextmanager
def _unchanged_modes(device: torch.device) -> Iterator[None]:
    kinds = {"cpu", device.type}
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        for kind, enabled, cast in casts:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, cast)


__all__ = ["undone"]
