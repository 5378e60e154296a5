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
from lightning_sg.partition.trace import Leak, Trace
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

    It marks the results: ``_sg_origin`` is the stage and the submodule that computed a tensor from parameters or
    activations, ``_sg_makers`` the submodules that took part, ``_sg_buffers`` the buffers that a tensor was computed
    from together with nothing but inputs.

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
        self._crossed: list[frozenset[str]] = []  # at each boundary that was reached, the makers of what crossed

    @property
    def _stage(self) -> int:
        return len(self.trace.order)

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
        touched, buffers, makers = False, set(), frozenset[str]()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                touched = self._note(tensor, func) or touched
                buffers |= self._buffers_of(tensor)
                makers |= self._makers_of(tensor)
        if self.in_last_stage and self.trace.loss is None:
            self.trace.loss = loss_of_call(func, args, kwargs)
        if func in _READS and self.in_last_stage and is_fake(args[0]):
            known = self.expects(args[0])
            return _READS[func] if known is None else type(_READS[func])(known)
        result = func(*args, **kwargs)
        if touched or buffers:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and touched:
                    tensor._sg_origin = (self._stage, self._inside[-1])  # type: ignore[attr-defined]
                    tensor._sg_makers = makers  # type: ignore[attr-defined]
                elif isinstance(tensor, Tensor):
                    tensor._sg_buffers = buffers  # type: ignore[attr-defined]
        return result

    def _buffers_of(self, tensor: Tensor) -> set[str]:
        """Notes and returns the buffers that one argument was computed from, together with nothing but inputs.

        Such a tensor belongs to no stage: every process that uses it computes it from its own copy of the buffers.
        """
        original = self._origin.get(id(tensor))
        if original is not None and not isinstance(original, nn.Parameter):
            names = {self._tensor_names[id(original)]}
        else:
            names = getattr(tensor, "_sg_buffers", set())
        for name in names:
            self.trace.uses.setdefault(name, set()).add(self._stage)
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

    def _note(self, tensor: Tensor, func: Callable[..., Any]) -> bool:
        """Notes the use of one argument; returns whether it depends on a parameter."""
        original = self._origin.get(id(tensor))
        if isinstance(original, nn.Parameter):
            name = self._tensor_names[id(original)]
            self.trace.uses.setdefault(name, set()).add(self._stage)
            self.trace.sizes[name] = original.numel()
            return True
        origin = getattr(tensor, "_sg_origin", None)
        if origin is None:
            return False
        if origin[0] != self._stage:
            self._note_leak(tensor, origin, getattr(func, "__name__", str(func)))
        return True

    def _note_leak(self, tensor: Tensor, origin: tuple[int, str], operation: str) -> None:
        if operation in _SHAPE_QUERIES:
            return
        flows = tensor.requires_grad and operation != "detach"
        makers = self._makers_of(tensor)
        apart = () if makers & self._crossed[origin[0]] else tuple(sorted(makers))
        leak = Leak(*origin, self._stage, self._inside[-1], operation, tuple(tensor.shape), flows, apart)
        self.trace.leaks.append(leak)

    def crossing(self, site: Site) -> Crossing:
        """The crossing of ``site`` in a traced step: ends one stage and begins the next."""

        def cross(tensors: list[Tensor]) -> list[Tensor]:
            for tensor in tensors:
                self._note(tensor, cross)
                self._buffers_of(tensor)
            self._count_flops()
            self._crossed.append(frozenset().union(*map(self._makers_of, tensors)))
            self.trace.order.append(site.name)
            why = Blocked.CHECKPOINTED if checkpointed() else site.blocked
            if why is not None:
                self.trace.blocked[site.name] = why
            self._crossing_now = True
            try:
                self.trace.shapes[site.name] = [tuple(tensor.shape) for tensor in tensors if tensor.is_floating_point()]
                self.trace.bytes[site.name] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                crossed = [tensor.view_as(tensor) for tensor in tensors]
            finally:
                self._crossing_now = False
            for tensor in crossed:
                tensor._sg_origin = (self._stage, f"boundary '{site.name}'")  # type: ignore[attr-defined]
                tensor._sg_makers = frozenset({f"boundary '{site.name}'"})  # type: ignore[attr-defined]
            return crossed

        return cross

    def _count_flops(self) -> None:
        self.trace.flops.append(self._counter.get_total_flops() - sum(self.trace.flops))

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
        missing = self._missing()
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

    def result(self) -> Trace:
        """The finished trace.

        Raises:
            BoundaryError: If the step did not reach every boundary, or one only without a gradient.
        """
        self._count_flops()
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
