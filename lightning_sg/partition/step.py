"""Traces one step: runs the user's code on fake tensors and undoes everything that it changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_sg.batch.copying import copy_of
from lightning_sg.boundary import Site
from lightning_sg.errors import BoundaryError
from lightning_sg.lightning_api import STEP_OUTPUT, pl
from lightning_sg.partition.fakes import FakeTensors
from lightning_sg.partition.shadow import shadowed
from lightning_sg.partition.trace import Trace
from lightning_sg.partition.tracer import Tracer
from lightning_sg.partition.undo import undone


class _StepEnds(BaseException):
    """Leaves the user's step. A ``BaseException``, so that no ``except Exception`` in the step catches it."""


def trace_step(
    module: nn.Module,
    sites: Sequence[Site],
    run: Callable[[], STEP_OUTPUT],
    device: torch.device,
    *,
    without_gradient: bool = True,
) -> Trace:
    """Runs a step on fake parameters and buffers. It computes, logs and counts nothing.

    The user's Python code runs one extra time. What it changes in the module is undone, see :func:`undone`. With manual
    optimization the trace ends at the first ``manual_backward``.

    Args:
        module: The LightningModule.
        sites: Its boundaries.
        run: Calls the step on a real batch.
        device: The device that the step runs on.
        without_gradient: Whether passes under ``no_grad`` count, see :meth:`Site.open`.

    Raises:
        BoundaryError: If the step ends without reaching a boundary.
        PartitionError: If code before the last boundary cannot run on fake tensors.
    """
    fakes = FakeTensors(module, None, device, trainable=True)
    counter = FlopCounterMode(display=False)
    tracer = Tracer(module, sites, fakes.origin, counter)
    stopped: Exception | None = None
    with ExitStack() as stack:
        stack.enter_context(undone(module, device))
        stack.enter_context(_ending_at_backward(module))
        stack.enter_context(fakes)
        stack.enter_context(tracer.following_modules())
        stack.enter_context(tracer.following_time(module))
        stack.enter_context(counter)
        stack.enter_context(tracer)
        try:
            for site in sites:
                site.open(tracer.crossing(site), without_gradient=without_gradient)
            run()
        except _StepEnds:
            pass
        except BoundaryError:
            raise
        except Exception as error:  # the user's code may raise anything
            stopped = error
        finally:
            for site in sites:
                site.close()
    if stopped is not None:
        tracer.stopped_by(stopped, lambda: _fails_anyway(module, sites, run, device, stopped))
    return tracer.result()


def _fails_anyway(
    module: nn.Module, sites: Sequence[Site], run: Callable[[], STEP_OUTPUT], device: torch.device, error: Exception
) -> bool:
    """Whether the step raises the same kind of error on real tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta or tensor.device.type != device.type for tensor in tensors):
        return False  # it cannot be tried here
    with undone(module, device), _ending_at_backward(module):
        try:
            run()
        except _StepEnds:
            return False
        except Exception as again:
            return type(again) is type(error)
        return False


def carries_gradient_later(
    module: nn.Module, sites: Sequence[Site], run: Callable[[int], STEP_OUTPUT], device: torch.device
) -> set[str]:
    """The boundaries that one of the next steps reaches with a gradient: a step may train all stages now and then only.

    Runs the step a few more times, as :func:`trace_step` does; what it counts in the module goes on from one to the
    next.

    Args:
        module: The LightningModule.
        sites: Its boundaries.
        run: Calls the step on a real batch as the one that comes so many batches later.
        device: The device that the step runs on.
    """
    found: set[str] = set()

    def note(_tracer: Tracer) -> None:
        found.update(site.name for site in sites if site.crossed and site.blocked is None)

    _look_ahead(module, sites, run, device, note)
    return found


def trains_later(
    module: nn.Module, sites: Sequence[Site], run: Callable[[int], STEP_OUTPUT], device: torch.device
) -> set[int]:
    """The stages that one of the next steps trains, although the first may go past all their layers.

    The arguments are those of :func:`carries_gradient_later`.
    """
    found: set[int] = set()
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]

    def note(tracer: Tracer) -> None:
        found.update(stage for name in trainable for stage in tracer.trace.uses.get(name, ()))

    _look_ahead(module, sites, run, device, note)
    return found


def _look_ahead(
    module: nn.Module,
    sites: Sequence[Site],
    run: Callable[[int], STEP_OUTPUT],
    device: torch.device,
    note: Callable[[Tracer], None],
) -> None:
    """Traces a few more steps, each as far as it goes."""
    fakes = FakeTensors(module, None, device, trainable=True)
    counter = FlopCounterMode(display=False)
    tracers = [Tracer(module, sites, fakes.origin, counter) for _ in range(_STEPS_AHEAD)]
    with ExitStack() as stack:
        stack.enter_context(undone(module, device))
        stack.enter_context(_ending_at_backward(module))
        stack.enter_context(fakes)
        for ahead, tracer in enumerate(tracers):
            try:
                for site in sites:
                    site.open(tracer.crossing(site))
                with tracer:
                    run(ahead)
            except _StepEnds:
                pass
            except Exception:  # the last stage may not run on fake tensors, and it has passed all boundaries then
                pass
            finally:
                note(tracer)
                for site in sites:
                    site.close()


# How many steps are run to see whether a boundary that the first passes without a gradient has one later.
_STEPS_AHEAD = 8


def call_training_step(module: pl.LightningModule, batch: Any, batch_idx: int) -> STEP_OUTPUT:
    """Calls the user's step as Lightning does, with a copy of the batch."""
    takes_index = len(inspect.signature(module.training_step).parameters) > 1
    copied = copy_of(batch)
    return module.training_step(*((copied, batch_idx) if takes_index else (copied,)))


def later(args: Sequence[Any], kwargs: dict[str, Any], ahead: int) -> tuple[Sequence[Any], dict[str, Any]]:
    """A step's arguments with the index of a later batch, if it takes one."""
    if "batch_idx" in kwargs:
        return args, {**kwargs, "batch_idx": kwargs["batch_idx"] + ahead}
    if len(args) > 1 and isinstance(args[1], int):
        return [args[0], args[1] + ahead, *args[2:]], kwargs
    return args, kwargs


def _ending_at_backward(module: nn.Module) -> AbstractContextManager[None]:
    def end_step(*_args: Any, **_kwargs: Any) -> None:
        raise _StepEnds

    return shadowed([(module, "manual_backward", end_step)])


__all__ = ["call_training_step", "carries_gradient_later", "later", "trace_step", "trains_later"]
