"""Traces one step: runs the user's code on fake tensors and undoes everything that it changed."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg.batch.copying import copy_of
from lightning_sg.boundary import Crossing, Site
from lightning_sg.errors import BoundaryError, PartitionError
from lightning_sg.lightning_api import STEP_OUTPUT, pl
from lightning_sg.partition.answers import Answers
from lightning_sg.partition.copies import CopiedTensors
from lightning_sg.partition.fakes import FakeTensors
from lightning_sg.partition.loss_inputs import LossInputs, inputs_of_loss
from lightning_sg.partition.numbers import lengths_of_tensors
from lightning_sg.partition.recorder import Recorder
from lightning_sg.partition.repeatable import Rows
from lightning_sg.partition.shadow import shadowed
from lightning_sg.partition.trace import Trace
from lightning_sg.partition.tracer import Tracer
from lightning_sg.partition.undo import undone
from lightning_sg.partition.work import WorkCounter
from lightning_sg.passes import hearing_passes
from lightning_sg.subclasses import fakes_stay_plain

#: How many steps are run to see whether later ones show what the first does not.
STEPS_AHEAD = 8
#: How often a step that fails is run again with other answers to the conditions that it reads.
_OTHER_ANSWERS = 6


class StepEnds(BaseException):
    """Leaves the user's step. A ``BaseException``, so that no ``except Exception`` in the step catches it."""


@dataclass(frozen=True)
class Following:
    """How a step is followed.

    Attributes:
        module: The LightningModule.
        sites: Its boundaries.
        device: The device that the step runs on.
        without_gradient: Whether passes under ``no_grad`` count, see :meth:`Site.open`.
        batch: The batch, in which the inputs of the loss are looked for.
    """

    module: nn.Module
    sites: Sequence[Site]
    device: torch.device
    without_gradient: bool = True
    batch: Any = None


def trace_step(
    module: nn.Module,
    sites: Sequence[Site],
    run: Callable[[], STEP_OUTPUT],
    device: torch.device,
    *,
    without_gradient: bool = True,
    batch: Any = None,
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
        batch: The batch, in which the inputs of the loss are looked for.

    Raises:
        BoundaryError: If the step ends without reaching a boundary.
        PartitionError: If code before the last boundary cannot run on fake tensors.
    """
    tracer, recorder, _has_loss = _follow(Following(module, sites, device, without_gradient, batch), run)
    return _finished(tracer, recorder)


def trace_first_step(following: Following, run: Callable[[int], STEP_OUTPUT], *, training: bool) -> Trace | None:
    """Traces the first step that crosses all boundaries: this one, or one of those that follow.

    Args:
        following: How it is followed.
        run: Calls the step on a real batch as the one that comes so many batches later.
        training: Whether it is a training step, which may be the first that crosses none only if it has no loss.

    Returns:
        ``None`` if the step does without some boundary, so that a later one has to show the stages.

    Raises:
        BoundaryError: If steps with a loss do not reach a boundary.
        PartitionError: If code before the last boundary cannot run on fake tensors.
    """
    first: Callable[[], Trace] | None = None
    for ahead in range(STEPS_AHEAD if training else 1):
        try:
            tracer, recorder, has_loss = _follow(following, partial(run, ahead))
        except PartitionError:
            if first is None:
                raise
            break  # what a later step does is no reason to refuse the first
        if tracer.complete:
            return _finished(tracer, recorder)
        if not training or not (has_loss or tracer.trace.order):
            return None
        first = first or partial(_finished, tracer, recorder)
    assert first is not None
    return first()


def _finished(tracer: Tracer, recorder: Recorder) -> Trace:
    """The trace of a step that has reached all boundaries, with the inputs of its loss."""
    trace = tracer.result()
    trace.inputs = inputs_of_loss(recorder, trace.loss, _rows(trace, recorder, tracer.crossings), trace.cut_short)
    for name in trace.inputs.buffers:
        trace.uses.setdefault(name, set()).update(range(trace.stages))
    recorder.forget()
    return trace


def _follow(following: Following, run: Callable[[], STEP_OUTPUT]) -> tuple[Tracer, Recorder, bool]:
    """Runs a step on fake tensors; returns who has followed it, and whether it has a loss.

    A step that fails in its last stage may have read a condition that was answered wrong.
    """
    first = followed = _followed(following, run, Answers())
    for _ in range(_OTHER_ANSWERS):
        others = followed.answers.others()
        if followed.stopped is None or not followed.tracer.in_last_stage or others is None:
            break
        followed = _followed(following, run, others)
    stopped = first.stopped
    if followed.stopped is not None and stopped is not None:
        followed = first
        first.tracer.stopped_by(
            stopped, lambda: _fails_anyway(following.module, following.sites, run, following.device, stopped)
        )
    return followed.tracer, followed.recorder, followed.has_loss


@dataclass(frozen=True)
class _Followed:
    """A step that was run on fake tensors.

    Attributes:
        tracer: Has seen its operations.
        recorder: Has recorded them.
        answers: Have answered what it read.
        has_loss: Whether it has a loss.
        stopped: What its code raised.
    """

    tracer: Tracer
    recorder: Recorder
    answers: Answers
    has_loss: bool
    stopped: Exception | None


def _followed(following: Following, run: Callable[[], STEP_OUTPUT], answers: Answers) -> _Followed:
    module, sites, device = following.module, following.sites, following.device
    without_gradient, has_loss = following.without_gradient, False
    fakes = FakeTensors(module, None, device, trainable=True)
    counter = WorkCounter()
    tracer = Tracer(module, sites, fakes, counter, answers)
    tracer.trace.device = device.type
    stopped: Exception | None = None
    with ExitStack() as stack:
        stack.enter_context(
            undone(module, device, lambda *call: recorder.run_metric(*call) if tracer.in_last_stage else None)
        )
        stack.enter_context(ending_at_backward(module, lambda loss: recorder.take_loss(loss, by_hand=True)))
        stack.enter_context(fakes)
        stack.enter_context(fakes_stay_plain(lambda *both: recorder.take_same(*both)))
        recorder = Recorder(module, following.batch, fakes.origin)
        tracer.expects, tracer.layout_of = recorder.expected, recorder.layout_of
        stack.enter_context(tracer.following_modules())
        stack.enter_context(tracer.following_numbers(module, recorder.draws.next_stage))
        stack.enter_context(tracer.following_time(module))
        stack.enter_context(counter)
        stack.enter_context(lengths_of_tensors())
        stack.enter_context(recorder)  # before the tracer, which shall not see what the recorder does
        stack.enter_context(tracer)
        try:
            for site in sites:
                site.open(tracer.crossing(site), without_gradient=without_gradient)
            result = run()
            has_loss = result is not None
            recorder.take_loss(result)
            tracer.take_result(result)
        except StepEnds:
            has_loss = True
        except BoundaryError:
            raise
        except Exception as error:  # the user's code may raise anything
            stopped = error
        finally:
            recorder.look_for_changes(module)
            for site in sites:
                site.close()
    return _Followed(tracer, recorder, answers, has_loss, stopped)


def inputs_on_values(
    module: nn.Module, sites: Sequence[Site], run: Callable[[], STEP_OUTPUT], device: torch.device, batch: Any
) -> LossInputs:
    """Finds the inputs of the loss in a step that needs values: runs it on copies of the model's tensors.

    Args:
        module: The LightningModule, all of which is in this process.
        sites: Its boundaries.
        run: Calls the step on a real batch.
        device: The device that the step runs on.
        batch: The batch, in which the inputs of the loss are looked for.
    """
    copies, trace, reason = CopiedTensors(module), Trace(), None
    crossings = Counter[str]()

    def crossing(site: Site) -> Crossing:
        def cross(tensors: list[Tensor]) -> list[Tensor]:
            crossings[site.name] += 1
            if site.name not in trace.order:
                trace.order.append(site.name)
                trace.shapes[site.name] = [tuple(tensor.shape) for tensor in tensors if tensor.is_floating_point()]
            return [tensor.view_as(tensor) for tensor in tensors]

        return cross

    with ExitStack() as stack:
        stack.enter_context(undone(module, device, lambda *call: recorder.run_metric(*call)))
        stack.enter_context(ending_at_backward(module, lambda loss: recorder.take_loss(loss, by_hand=True)))
        stack.enter_context(copies)
        stack.enter_context(fakes_stay_plain(lambda *both: recorder.take_same(*both)))
        recorder = Recorder(module, batch, copies.origin)
        stack.enter_context(hearing_passes(module, sites, recorder.draws.next_stage))
        stack.enter_context(lengths_of_tensors())
        stack.enter_context(recorder)
        try:
            for site in sites:
                site.open(crossing(site), without_gradient=False)
            recorder.take_loss(run())
        except StepEnds:
            pass
        except Exception as error:  # the user's code may raise anything; it will again in training
            reason = f"{type(error).__name__}: {error}"
        finally:
            recorder.look_for_changes(module)
            for site in sites:
                site.close()
    found = inputs_of_loss(recorder, None, _rows(trace, recorder, max(crossings.values(), default=0)), reason)
    recorder.forget()
    return found


def _rows(trace: Trace, recorder: Recorder, crossings: int) -> Rows:
    """The rows of what crosses the first boundary, and of the batch."""
    shapes = [shape for name in trace.order for shape in trace.shapes[name] if shape]
    return Rows(shapes[0][0] if shapes else 0, recorder.rows, crossings, recorder.by_hand)


def _fails_anyway(
    module: nn.Module, sites: Sequence[Site], run: Callable[[], STEP_OUTPUT], device: torch.device, error: Exception
) -> bool:
    """Whether the step raises the same kind of error on real tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta or tensor.device.type != device.type for tensor in tensors):
        return False  # it cannot be tried here
    with undone(module, device), ending_at_backward(module), fakes_stay_plain():
        try:
            run()
        except StepEnds:
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
        uses = tracer.settle().uses
        found.update(stage for name in trainable for stage in uses.get(name, ()))

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
    counter = WorkCounter()
    tracers = [Tracer(module, sites, fakes, counter) for _ in range(STEPS_AHEAD)]
    with ExitStack() as stack:
        stack.enter_context(undone(module, device))
        stack.enter_context(ending_at_backward(module))
        stack.enter_context(fakes)
        stack.enter_context(fakes_stay_plain())
        for ahead, tracer in enumerate(tracers):
            try:
                for site in sites:
                    site.open(tracer.crossing(site))
                with tracer:
                    run(ahead)
            except StepEnds:
                pass
            except Exception:  # the last stage may not run on fake tensors, and it has passed all boundaries then
                pass
            finally:
                note(tracer)
                for site in sites:
                    site.close()


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


def ending_at_backward(
    module: nn.Module, take_loss: Callable[[Any], None] = lambda _loss: None
) -> AbstractContextManager[None]:
    """While entered, a step of the module's ends where it goes backward by hand.

    Args:
        module: The LightningModule.
        take_loss: Is given what it goes backward from.
    """

    def end_step(*args: Any, **_kwargs: Any) -> None:
        take_loss(args[0] if args else None)
        raise StepEnds

    return shadowed([(module, "manual_backward", end_step)])


__all__ = [
    "STEPS_AHEAD",
    "Following",
    "StepEnds",
    "call_training_step",
    "carries_gradient_later",
    "ending_at_backward",
    "inputs_on_values",
    "later",
    "trace_first_step",
    "trace_step",
    "trains_later",
]
