"""Follows a step operation by operation and notes which stage uses what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_sg._compat import DATA_DEPENDENT_ERRORS, tree_leaves
from lightning_sg.boundary import Crossing, Site
from lightning_sg.errors import BoundaryError, PartitionError
from lightning_sg.gradient_flow import Blocked, checkpointed, never_trains
from lightning_sg.partition.fakes import is_fake
from lightning_sg.partition.losses import loss_of_call
from lightning_sg.partition.shadow import shadowed
from lightning_sg.partition.trace import Trace
from lightning_sg.partition.uses import Note, Notes, Use
from lightning_sg.time_boundary import boundaries_in_time

# The last stage may read values of its tensors. In a traced step each read returns this constant, whatever the value
# would be: it only has to let the step go on. Numbers are taken for finite where the step asks.
_READS: dict[Callable[..., Any], Any] = {
    Tensor.item: 1.0,
    Tensor.__float__: 1.0,
    Tensor.__int__: 1,
    Tensor.__bool__: True,
}
# Asking for a shape uses no value, so it is no leak.
_SHAPE_QUERIES = ("__get__", "size", "dim", "numel")


class Tracer(TorchFunctionMode):
    """Sees every torch operation of a step, with its arguments.

    It marks the results: ``_sg_note`` is the operation that computed a tensor from parameters, activations or buffers,
    ``_sg_makers`` the submodules that took part, ``_sg_buffers`` the buffers that a tensor was computed from together
    with nothing but inputs.

    Args:
        module: The LightningModule.
        sites: Its boundaries.
        origin: For the id of each fake tensor, the parameter or buffer that it stands for.
        counter: Counts the floating-point operations of the step.

    Attributes:
        trace: What was noted so far.
        expects: What a value is that the step reads, if it checks whether numbers are finite; ``None`` if not.
    """

    def __init__(
        self, module: nn.Module, sites: Sequence[Site], origin: Mapping[int, Tensor], counter: FlopCounterMode
    ) -> None:
        super().__init__()
        self.trace = Trace()
        self._sites = {site.name: site for site in sites}
        self._origin = origin
        self._counter = counter
        self._module_names = {id(child): name or type(module).__name__ for name, child in module.named_modules()}
        self._tensor_names = {
            id(tensor): name for named in (module.named_buffers(), module.named_parameters()) for name, tensor in named
        }
        self.expects: Callable[[Tensor], bool | None] = lambda _tensor: None
        self._inside: list[str] = [type(module).__name__]
        self._crossing_now = False
        self._crossed: dict[int, frozenset[str]] = {}  # at each boundary that was reached, the makers of what crossed
        self._notes = Notes()
        self._stage = 0
        self._counted = 0  # of the operations

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
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        names = [name for tensor in tensors for name in self._parameter_of(tensor)]
        uses = [use for tensor in tensors for use in self._uses_of(tensor, func)]
        touched = bool(names) or any(not use.note.free for use in uses)
        buffers = set[str]().union(*map(self._buffers_of, tensors))
        makers = frozenset[str]().union(*map(self._makers_of, tensors))
        if self.in_last_stage and self.trace.loss is None:
            self.trace.loss = loss_of_call(func, args, kwargs)
        if func in _READS and self.in_last_stage and is_fake(args[0]):
            known = self.expects(args[0])
            return _READS[func] if known is None else type(_READS[func])(known)
        result = func(*args, **kwargs)
        if touched or buffers:
            note = self._notes.add(Note(self._stage, self._inside[-1], [*names, *buffers], uses, free=not touched))
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    tensor._sg_note = note  # type: ignore[attr-defined]
                    if touched:
                        tensor._sg_makers = makers  # type: ignore[attr-defined]
                    else:
                        tensor._sg_buffers = buffers  # type: ignore[attr-defined]
        return result

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

    def _uses_of(self, tensor: Tensor, func: Callable[..., Any]) -> list[Use]:
        """The use of one argument, if another operation has computed it."""
        note: Note | None = getattr(tensor, "_sg_note", None)
        if note is None or isinstance(self._origin.get(id(tensor)), nn.Parameter):
            return []
        operation = getattr(func, "__name__", str(func))
        flows = tensor.requires_grad and operation != "detach"
        counts = operation not in _SHAPE_QUERIES
        return [Use(note, operation, tuple(tensor.shape), flows, self._makers_of(tensor), counts)]

    def crossing(self, site: Site) -> Crossing:
        """The crossing of ``site`` in a traced step: ends one stage and begins the next."""

        def cross(tensors: list[Tensor]) -> list[Tensor]:
            trace, again = self.trace, site.name in self.trace.order
            number = trace.order.index(site.name) if again else len(trace.order)
            uses = [use for tensor in tensors for use in self._uses_of(tensor, cross)]
            if again:
                self._notes.claim([use.note for use in uses], number, trace.order)
                self._count_flops()
            else:
                trace.order.append(site.name)
                trace.flops.append(self._count_flops())
                trace.shapes[site.name] = [tuple(tensor.shape) for tensor in tensors if tensor.is_floating_point()]
            trace.crossings[site.name] = trace.crossings.get(site.name, 0) + 1
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
            for tensor in crossed:
                tensor._sg_note = note  # type: ignore[attr-defined]
                tensor._sg_makers = frozenset({made_by})  # type: ignore[attr-defined]
            return crossed

        return cross

    def _count_flops(self) -> int:
        """The operations since they were counted last."""
        before, self._counted = self._counted, self._counter.get_total_flops()
        return self._counted - before

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

    def stopped_by(self, error: Exception, fails_anyway: Callable[[], bool] = lambda: False) -> None:
        """Handles an error that the user's code raised.

        In the last stage it only cuts the trace short: fake tensors cannot run all of that code.

        Args:
            error: The error.
            fails_anyway: Finds out whether the code raises it on real tensors, too.

        Raises:
            PartitionError: If it came before the last stage.
        """
        if self.in_last_stage:
            self.trace.cut_short = f"{type(error).__name__}: {error}"
            return
        missing = self._missing() or self.trace.order[self._stage :]
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
            "move the boundary."
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
        trace.flops.append(self._count_flops())
        times = [trace.crossings[name] for name in trace.order]
        trace.flops = [flops * count for flops, count in zip(trace.flops, [*times, *times[-1:]] or [1])]
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
