"""Follows a step operation by operation and notes which stage uses what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lightning_sg._compat import DATA_DEPENDENT_ERRORS, tree_leaves
from lightning_sg.boundary import Crossing, Site
from lightning_sg.errors import BoundaryError, PartitionError
from lightning_sg.gradient_flow import Blocked, checkpointed, never_trains
from lightning_sg.partition.answers import Answers
from lightning_sg.partition.fakes import FakeTensors, is_fake
from lightning_sg.partition.losses import loss_of_call
from lightning_sg.partition.notes import Note, Notes, Use
from lightning_sg.partition.shadow import shadowed
from lightning_sg.partition.trace import NUMBERS, Trace
from lightning_sg.partition.uses import (
    RANDOM,
    computed_among,
    name_of,
    reads_numbers,
    uses_values,
    values_among,
    written,
)
from lightning_sg.partition.work import StageWork, WorkCounter
from lightning_sg.passes import hearing_passes
from lightning_sg.predictors.layout import Layout
from lightning_sg.subclasses import call_beside_fakes
from lightning_sg.time_boundary import boundaries_in_time


class Tracer(TorchFunctionMode):
    """Sees every torch operation of a step, with its arguments.

    It marks the results: ``_sg_note`` is the operation that computed a tensor from parameters, activations or buffers,
    ``_sg_makers`` the submodules that took part, ``_sg_buffers`` the buffers that a tensor was computed from together
    with nothing but inputs.

    Args:
        module: The LightningModule.
        sites: Its boundaries.
        fakes: Stand for the module's parameters and buffers.
        counter: Counts the floating-point operations of the step.
        answers: Answers reads of values in the last stage.

    Attributes:
        trace: What was noted so far.
        expects: What a value is that the step reads, if it checks whether numbers are finite; ``None`` if not.
        layout_of: The order of the dimensions of tensors.
    """

    def __init__(
        self,
        module: nn.Module,
        sites: Sequence[Site],
        fakes: FakeTensors,
        counter: WorkCounter,
        answers: Answers | None = None,
    ) -> None:
        super().__init__()
        self.trace = Trace()
        self._crossings: dict[str, int] = {}
        self._sites = {site.name: site for site in sites}
        self._origin = fakes.origin
        self._fakes = fakes
        self._drawn_before = fakes.drawn  # when the numbers began
        self._counter = counter
        self._answers = answers or Answers()
        fakes.answer_conditions(lambda: self._answers.to_condition() if self.in_last_stage else None)
        self._module_names = {id(child): name or type(module).__name__ for name, child in module.named_modules()}
        self._tensor_names = {
            id(tensor): name for named in (module.named_buffers(), module.named_parameters()) for name, tensor in named
        }
        self.expects: Callable[[Tensor], bool | None] = lambda _tensor: None
        self.layout_of: Callable[[list[Tensor]], Layout] = lambda _tensors: Layout()
        self._inside: list[str] = [type(module).__name__]
        self._crossing_now = False
        self._crossed: dict[int, frozenset[str]] = {}  # at each boundary that was reached, the makers of what crossed
        self._marked: list[Tensor] = []
        self._notes = Notes()
        self._stage = 0
        self._counted = StageWork(counter.forward, counter.step)

    @property
    def crossings(self) -> int:
        """How often the step crosses the boundary that it crosses most often."""
        return max(self._crossings.values(), default=0)

    @property
    def in_last_stage(self) -> bool:
        """Whether the step has passed all boundaries."""
        return self._stage == len(self._sites)

    # ------------------------------------------------------------------ during the step

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._crossing_now:
            return func(*args, **kwargs)
        if func is Tensor.__iter__ and args[0].ndim:  # the rows that it goes through are to be marked, too
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        arguments = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        values = list(values_among(func, args, kwargs))
        if self.in_last_stage and self.trace.loss is None:
            self.trace.loss = loss_of_call(func, args, kwargs)
        reads = self.in_last_stage and Answers.is_read(func)
        if reads and (is_fake(args[0]) or self._is_untrue(args[0])):
            self._add(name_of(func), arguments, values, [])
            return self._answers.to(func, self.expects(args[0]))
        self._check_reads(func, values)
        try:
            trained = [each for each in arguments if self._needs_gradient(each)]
            result = self._counter.call(lambda: call_beside_fakes(func, args, kwargs), trained)
        except Exception:
            self._add(name_of(func), arguments, values)
            raise
        if not uses_values(func, result):
            return result
        target = written(func, args, kwargs)
        results = [leaf for leaf in (*tree_leaves(result), target) if isinstance(leaf, Tensor)]
        note = self._add(name_of(func), arguments, values, results)
        computed = {id(tensor) for tensor in computed_among(func, result) if not is_fake(tensor)}
        self._mark(note, [each for each in results if id(each) not in computed], arguments, values)
        if name_of(func) in RANDOM and self._fakes.drawn > self._drawn_before:
            self._mark_as_drawn(results)
        return result

    def _check_reads(self, func: Callable[..., Any], values: Sequence[Tensor]) -> None:
        """Refuses to read a tensor that has data, but was written to from tensors without.

        Raises:
            DataDependentOutputException: As if the tensor had no data, before the last stage.
        """
        if self.in_last_stage or not reads_numbers(func):
            return
        if any(map(self._is_untrue, values)):
            raise DATA_DEPENDENT_ERRORS[0](name_of(func))

    def _add(
        self,
        operation: str,
        arguments: Sequence[Tensor],
        values: Sequence[Tensor],
        results: Sequence[Tensor] | None = None,
    ) -> Note | None:
        """Notes an operation.

        Args:
            operation: Its name.
            arguments: The tensors that it was given.
            values: Those that it uses the values of.
            results: What it returned or changed; ``None`` if that is not known.

        Returns:
            ``None`` if the operation has to do with the batch only.
        """
        names = [name for tensor in values for name in (*self._parameter_of(tensor), *self._buffers_of(tensor))]
        flows = results is None or any(each.requires_grad for each in results)
        counted = {id(tensor) for tensor in values}
        uses = [use for each in arguments for use in self._uses_of(each, operation, id(each) in counted, flows)]
        touched = any(map(self._is_touched, arguments))
        if not (names or uses or touched or any(map(self._buffers_of, arguments))):
            return None
        return self._notes.add(Note(self._stage, self._inside[-1], names, uses, free=not touched))

    def _mark(
        self, note: Note | None, results: Sequence[Tensor], arguments: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        """Notes in the results of an operation what they were computed from.

        What has data although tensors without gave it a shape depends on the batch alone, and is the same in every
        process. But tensors without data may be written into one with: then its data are untrue.
        """
        if note is None:
            return
        buffers = set[str]().union(*map(self._buffers_of, arguments))
        makers = frozenset[str]().union(*map(self._makers_of, arguments))
        by_values = any(map(self._is_touched, values))
        for tensor in results:
            if not (is_fake(tensor) or by_values):
                continue
            if not note.free:
                self._put_mark(tensor, note, makers)
            elif buffers:
                tensor._sg_note, tensor._sg_buffers = note, buffers  # type: ignore[attr-defined]

    def _mark_as_drawn(self, results: Sequence[Tensor]) -> None:
        """Random numbers that follow others which only their stage draws are this stage's, too."""
        for tensor in results:
            note: Note | None = getattr(tensor, "_sg_note", None)
            if note is None or note.free:
                note = self._notes.add(Note(self._stage, self._inside[-1]))
            self._put_mark(tensor, note, self._makers_of(tensor) | {NUMBERS})

    def _put_mark(self, tensor: Tensor, note: Note, makers: frozenset[str]) -> None:
        tensor._sg_note, tensor._sg_makers = note, makers  # type: ignore[attr-defined]
        if not is_fake(tensor):
            self._marked.append(tensor)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        for tensor in self._marked:  # the user's own
            tensor.__dict__.pop("_sg_note", None)
            tensor.__dict__.pop("_sg_makers", None)
        self._marked.clear()

    def _is_touched(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or depends on one."""
        if isinstance(self._origin.get(id(tensor)), nn.Parameter):
            return True
        note: Note | None = getattr(tensor, "_sg_note", None)
        return note is not None and not note.free

    def _needs_gradient(self, tensor: Tensor) -> bool:
        """Whether a backward pass computes its gradient; in an evaluation step, whether that of a training step may."""
        return tensor.requires_grad if torch.is_grad_enabled() else self._is_touched(tensor)

    def _is_untrue(self, tensor: Tensor) -> bool:
        """Whether a tensor has data, which are not what they would be, as tensors without were written into it."""
        return not is_fake(tensor) and self._is_touched(tensor) and bool(self._makers_of(tensor) - {NUMBERS})

    def _buffers_of(self, tensor: Tensor) -> set[str]:
        """The buffers that one argument was computed from, together with nothing but inputs.

        Such a tensor belongs to no stage: every process that uses it computes it from its own copy of the buffers.
        """
        original = self._origin.get(id(tensor))
        if original is not None and not isinstance(original, nn.Parameter):
            return {self._tensor_names[id(original)]}
        names: set[str] = getattr(tensor, "_sg_buffers", set())
        return names

    def _makers_of(self, tensor: Tensor) -> frozenset[str]:
        """The largest submodules without a boundary in them that took part in computing one argument."""
        original = self._origin.get(id(tensor))
        if not isinstance(original, nn.Parameter):
            return getattr(tensor, "_sg_makers", frozenset())
        maker, *rest = self._tensor_names[id(original)].split(".")
        while len(rest) > 1 and any(site.startswith(f"{maker}.") for site in self._sites):
            maker = f"{maker}.{rest.pop(0)}"
        return frozenset({maker})

    def _parameter_of(self, tensor: Tensor) -> list[str]:
        """The parameter that one argument is, if it is one."""
        original = self._origin.get(id(tensor))
        if not isinstance(original, nn.Parameter):
            return []
        name = self._tensor_names[id(original)]
        self.trace.sizes[name] = original.numel()
        return [name]

    def _uses_of(self, tensor: Tensor, operation: str, counts: bool, flows: bool) -> list[Use]:
        """The use of one argument, if another operation has computed it."""
        note: Note | None = getattr(tensor, "_sg_note", None)
        if note is None or isinstance(self._origin.get(id(tensor)), nn.Parameter):
            return []
        flows = flows and tensor.requires_grad
        return [Use(note, operation, tuple(tensor.shape), flows, self._makers_of(tensor), counts)]

    def crossing(self, site: Site) -> Crossing:
        """The crossing of ``site`` in a traced step: ends one stage and begins the next."""

        def cross(tensors: list[Tensor]) -> list[Tensor]:
            trace, again = self.trace, site.name in self.trace.order
            number = trace.order.index(site.name) if again else len(trace.order)
            uses = [use for tensor in tensors for use in self._uses_of(tensor, "cross", True, True)]
            if again:
                self._notes.claim([use.note for use in uses], number, trace.order)
                self._count_work()
            else:
                trace.order.append(site.name)
                trace.work.append(self._count_work())
                floating = [tensor for tensor in tensors if tensor.is_floating_point()]
                trace.shapes[site.name] = [tuple(tensor.shape) for tensor in floating]
                trace.layouts[site.name] = self.layout_of(floating)
            self._crossings[site.name] = self._crossings.get(site.name, 0) + 1
            names = [name for tensor in tensors for name in (*self._parameter_of(tensor), *self._buffers_of(tensor))]
            self._notes.add(Note(number, self._inside[-1], names, uses))
            makers = frozenset[str]().union(*map(self._makers_of, tensors))
            self._crossed[number] = self._crossed.get(number, frozenset()) | makers
            why = Blocked.CHECKPOINTED if checkpointed() else site.blocked
            trace.blocked.pop(site.name, None)
            if why is not None:
                trace.blocked[site.name] = why
            self._stage = number + 1
            made_by = f"boundary '{site.name}'"
            note = self._notes.add(Note(self._stage, made_by, crossed=True))
            self._crossing_now = True
            try:
                size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                trace.bytes[site.name] = trace.bytes.get(site.name, 0) + size
                crossed = [tensor.view_as(tensor) for tensor in tensors]
            finally:
                self._crossing_now = False
            for tensor, before in zip(crossed, tensors):
                if not (is_fake(tensor) or self._is_touched(before)):
                    continue  # it depends on the batch alone
                tensor._sg_note = note  # type: ignore[attr-defined]
                tensor._sg_makers = frozenset({made_by})  # type: ignore[attr-defined]
            return crossed

        return cross

    def _count_work(self) -> StageWork:
        """The work since it was counted last."""
        before, self._counted = self._counted, StageWork(self._counter.forward, self._counter.step)
        return StageWork(self._counted.forward - before.forward, self._counted.step - before.step)

    @contextmanager
    def following_modules(self) -> Iterator[None]:
        """Keeps track of the submodule that is running, which messages name."""

        def enter(child: nn.Module, _args: Any) -> None:
            self._inside.append(self._module_names.get(id(child), type(child).__name__))

        def leave(_child: nn.Module, _args: Any, _output: Any) -> None:
            self._inside.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def following_numbers(self, module: nn.Module, passed: Callable[[], None]) -> AbstractContextManager[None]:
        """Notes where a step gets other random numbers, which follow none that only some stage draws.

        Args:
            module: The LightningModule.
            passed: Is called there, too.
        """

        def pass_on() -> None:
            self._drawn_before = self._fakes.drawn
            passed()

        return hearing_passes(module, list(self._sites.values()), pass_on)

    def following_time(self, module: nn.Module) -> AbstractContextManager[None]:
        """Notes which stages use the boundaries in time."""

        def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                self.trace.times.setdefault(name, set()).add(self._stage)
                return method(*args, **kwargs)

            return noted

        return shadowed(
            [
                (boundary, method, noting(name, getattr(boundary, method)))
                for name, boundary in boundaries_in_time(module).items()
                for method in boundary.uses
            ]
        )

    # ------------------------------------------------------------------ after the step

    def take_result(self, result: Any) -> None:
        """Takes what the step has returned."""
        notes = [getattr(leaf, "_sg_note", None) for leaf in tree_leaves(result)]
        self._notes.returned = [note for note in notes if note is not None]

    def stopped_by(self, error: Exception, fails_anyway: Callable[[], bool] = lambda: False) -> None:
        """Handles an error that the user's code raised.

        In the last stage it only cuts the trace short: fake tensors cannot run all of that code.

        Args:
            error: The error.
            fails_anyway: Finds out whether the code raises it on real tensors, too.

        Raises:
            PartitionError: If it came before the last stage; unless it comes on real tensors too, the error says which
                boundaries were reached.
        """
        if self.in_last_stage:
            self.trace.cut_short = f"{type(error).__name__}: {error}"
            return
        unreached = self._missing()
        missing = unreached or self.trace.order[self._stage :]
        where = f"in '{self._inside[-1]}' of stage {self._stage}, {type(error).__name__}: {error}."
        if not isinstance(error, DATA_DEPENDENT_ERRORS) and fails_anyway():
            raise PartitionError(
                f"The step fails before it comes to boundary '{missing[0]}': {where} It does so on ordinary tensors "
                "too, without any boundary, so the code or the batch is at fault."
            ) from error
        reads = " It reads a value (`.item()`, `if tensor:`, `.tolist()`, `.numpy()`)" * isinstance(
            error, DATA_DEPENDENT_ERRORS
        )
        raise PartitionError(
            f"The step cannot be followed to boundary '{missing[0]}': {where}{reads or ' It'} does not run on tensors "
            "without data, which stand for activations of other stages. Move the code behind the last boundary, or "
            "move the boundary.",
            self.trace.order if unreached else (),
            f"'{self._inside[-1]}' does not run on tensors without data ({type(error).__name__}: {error})",
        ) from error

    @property
    def complete(self) -> bool:
        """Whether the step has reached every boundary."""
        return not self._missing()

    def settle(self) -> Trace:
        """The trace of a step, whether it has reached all boundaries or not."""
        trace, notes = self.trace, self._notes
        trace.uses, trace.leaks, trace.turned_back = notes.uses(), notes.leaks(self._crossed), notes.turned_back
        return trace

    def result(self) -> Trace:
        """The finished trace.

        Raises:
            BoundaryError: If the step did not reach every boundary, or one only without a gradient.
        """
        trace = self.settle()
        trace.work.append(self._count_work())
        passes = [self._crossings[name] for name in trace.order]
        passes = [*passes, *passes[-1:]] or [1]
        trace.work = [work * count for work, count in zip(trace.work, passes)]
        missing = self._missing()
        passed = next((name for name in missing if self._sites[name].blocked), None)
        if passed is not None:
            why = self._sites[passed].blocked
            assert why is not None
            raise never_trains(passed, why, "the stage before it")
        if missing:
            raise BoundaryError(
                f"Boundary '{missing[0]}' was never reached in the step. Is the module called in `forward`? "
                f"Reached, in order: {self.trace.order or 'none'}."
            )
        return self.trace

    def _missing(self) -> list[str]:
        return [name for name in self._sites if name not in self.trace.order]


__all__ = ["Tracer"]
